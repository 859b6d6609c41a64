"""Every kernel source is compiled for what its rows say, and every kernel is in the table of its folder: no kernel goes
untested, and none can be chosen on a processor that lacks what its compiler may use.
"""

import dataclasses
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "sparse_ops"
CSRC = FOLDER / "csrc"
TABLES = sorted(CSRC.glob("kernels/*/kernels.inc"))
# What the compiler defines, and what the names of its sources begin with.
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a kernels.inc; ``prefix`` is that of its source, "" on every processor."""

    prefix: str
    name: str
    needs: frozenset[str]
    values: str
    lanes: int
    tile: int


def rows_of(table: str, known: dict[str, frozenset[str]]) -> list[Row]:
    """The rows of a kernels.inc, in order; ``known`` are the names that may stand for features."""
    rows: list[Row] = []
    where = ""
    for line in table.splitlines():
        if condition := re.fullmatch(r"#(?:if|elif) defined\(__(\w+)__\)", line):
            where = ARCHITECTURES[condition[1]]
        elif line == "#endif":
            where = ""
        elif row := re.fullmatch(r"KERNEL\((\w+), ([\w:| ]+), (\w+), (\d+)(?:, (\d+))?\)", line):
            needs = features_of(row[2], known)
            rows.append(Row(where, row[1], needs, row[3], int(row[4]), int(row[5] or 1)))
        else:
            assert line.startswith("//"), f"{line} is neither a row nor a condition"
    return rows


def features_of(expression: str, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """The features of an expression as in ``kAvx2 | Features::f16c``. Raises KeyError for an unknown name."""
    return frozenset().union(
        *(known[term.strip().removeprefix("Features::")] for term in expression.split("|"))
    )


def known_features() -> dict[str, frozenset[str]]:
    """The names in cpu_features.h that stand for features: single ones, and the sets made of them."""
    header = (CSRC / "cpu_features.h").read_text()
    bits = re.findall(r"^  (\w+) = 1u << (\d+),$", header, re.MULTILINE)
    known = {"none": frozenset[str]()} | {name: frozenset({name}) for name, _ in bits}
    assert len({bit for _, bit in bits}) == len(bits)
    for name, expression in re.findall(
        r"^inline constexpr Features (\w+) =\s+([^;]*);", header, re.MULTILINE
    ):
        known[name] = features_of(expression, known)
    return known


KNOWN = known_features()


def flags_of(cmake: str) -> dict[str, list[str]]:
    """What a CMakeLists.txt compiles the sources of each name with."""
    flags: dict[str, list[str]] = {}
    for name, values in re.findall(r"^set\(flags_(\w+) ([^)]*)\)", cmake, re.MULTILINE):
        flags[name] = []
        for value in values.split():
            other = re.fullmatch(r"\$\{flags_(\w+)\}", value)
            flags[name] += flags[other[1]] if other else [value] if value != '""' else []
    return flags


FLAGS = flags_of((FOLDER / "CMakeLists.txt").read_text())


def compiled_for(name: str) -> frozenset[str]:
    """The features that the compiler may use in a source of that name."""
    if not name.startswith(("x86_", "arm_")):
        return frozenset()
    found = {"neon"} if name.startswith("arm_") else set()
    for flag in FLAGS[name]:
        if flag.startswith("-march="):
            found |= set(flag.split("+")[1:])
        elif flag not in (
            "-mprefer-vector-width=512",
            "-mamx-tile",
        ):  # how, and what the two others of AMX share
            found.add(flag.removeprefix("-m").replace("-", "_"))
    return frozenset(found)


def defined_in(source: str) -> list[str]:
    return re.findall(r"^constexpr Kernel (\w+) =", source, re.MULTILINE)


def sources_of(table: Path) -> dict[str, Path]:
    """The source beside a table that defines each kernel."""
    sources: dict[str, Path] = {}
    for source in sorted(table.parent.glob("*.cc")):
        for name in defined_in(source.read_text()):
            assert name not in sources, f"{source} and {sources[name]} both define {name}"
            sources[name] = source
    return sources


def prefix_of(source: Path) -> str:
    return source.stem.split("_")[0] if source.stem.startswith(("x86_", "arm_")) else ""


per_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.parent.name)


def test_there_are_tables():
    families = {"attention", "normalization", "peak", "quads", "recurrent", "spconv", "spmm"}
    assert {table.parent.name for table in TABLES} >= families


@per_table
def test_rows_and_definitions_agree(table):
    rows, sources = rows_of(table.read_text(), KNOWN), sources_of(table)
    assert sorted(row.name for row in rows) == sorted(sources)
    for row in rows:
        assert prefix_of(sources[row.name]) == row.prefix, row
        assert f"row::{row.name}" in sources[row.name].read_text(), row


@per_table
def test_every_architecture_sees_a_name_once(table):
    rows = rows_of(table.read_text(), KNOWN)
    for prefix in ARCHITECTURES.values():
        names = [row.name for row in rows if row.prefix in (prefix, "")]
        assert len(names) == len(set(names))


@per_table
def test_a_row_needs_all_that_its_source_is_compiled_for(table):
    sources = sources_of(table)
    for row in rows_of(table.read_text(), KNOWN):
        assert row.needs == compiled_for(sources[row.name].stem), row


@per_table
def test_a_table_ends_in_generic_and_the_reference(table):
    *_, last, reference = rows_of(table.read_text(), KNOWN)
    assert last.name.startswith("generic")
    assert reference.name == "reference"
    assert last.prefix == reference.prefix == ""
    assert last.needs == reference.needs == frozenset()


@per_table
def test_a_row_that_needs_more_comes_first(table):
    """Else it would never be the first whose features are there; of one set, wide tiles come before narrow ones."""
    *rows, _ = rows_of(table.read_text(), KNOWN)
    for index, row in enumerate(rows):
        for later in rows[index + 1 :]:
            if row.prefix == later.prefix and row.tile == later.tile and row.values == later.values:
                assert not row.needs <= later.needs or row.needs == later.needs, (row, later)
            if row.needs == later.needs and row.prefix == later.prefix:
                assert row.tile > later.tile, (row, later)


def test_every_named_source_has_flags():
    for source in CSRC.glob("kernels/*/*_*.cc"):
        if prefix_of(source):
            assert source.stem in FLAGS, f"{source.name}: CMakeLists.txt has no flags_{source.stem}"


def test_flags_are_of_known_features():
    assert {"x86_avx2", "x86_avx512", "arm_neon"} <= set(FLAGS)
    for name in FLAGS:
        assert compiled_for(name) <= set(KNOWN), name


def test_every_feature_has_a_name_for_users():
    header = (CSRC / "cpu_features.h").read_text()
    named = re.findall(r'\{"(\w+)", Features::(\w+)\}', header)
    assert all(name == feature for name, feature in named)
    assert [name for name, _ in named] == re.findall(r"^  (\w+) = 1u << \d+,$", header, re.MULTILINE)


def test_kernels_are_compiled_by_rule():
    """No list of sources can forget one."""
    cmake = re.sub(r"#.*", "", (FOLDER / "CMakeLists.txt").read_text())
    assert re.search(r"file\(GLOB_RECURSE sources CONFIGURE_DEPENDS [^)]*csrc/\*\.cc\)", cmake)
    assert not re.findall(r"csrc/[\w/]+\.cc", cmake)


def test_every_test_source_is_built():
    cmake = re.sub(r"#.*", "", (FOLDER / "CMakeLists.txt").read_text())
    for path in Path(__file__).parent.glob("*.cc"):
        assert re.search(rf"\b{path.stem.removesuffix('_test')}\b", cmake), f"{path.name} is not built"


def test_a_wrong_table_is_found():
    known = {"none": frozenset(), "kAvx2": frozenset({"avx2", "fma"}), "f16c": frozenset({"f16c"})}
    table = (
        "// Best first.\n#if defined(__x86_64__)\nKERNEL(a, kAvx2 | Features::f16c, float32, 8, 4)\n#endif\n"
        "KERNEL(reference, Features::none, float32, 1)\n"
    )
    assert rows_of(table, known) == [
        Row("x86", "a", frozenset({"avx2", "fma", "f16c"}), "float32", 8, 4),
        Row("", "reference", frozenset(), "float32", 1, 1),
    ]
    for wrong in ("KERNEL(a, kAvx2, float32, 8", "KERNEL(a)", "KERNEL(a, kAvx2, float32)", "SPMM_KERNEL(a)"):
        with pytest.raises(AssertionError, match="neither a row nor a condition"):
            rows_of(wrong, known)
    with pytest.raises(KeyError, match="avx3"):
        rows_of("KERNEL(a, Features::avx3, float32, 8)", known)
    source = "constexpr Kernel a = {};\n  // constexpr Kernel b\nconstexpr Kernel c =\n"
    assert defined_in(source) == ["a", "c"]


def test_flags_are_read():
    cmake = 'set(flags_x86_a -ma -mb)\n# set(flags_z)\nset(flags_x86_c ${flags_x86_a} -mc)\nset(flags_arm_neon "")\n'
    assert flags_of(cmake) == {"x86_a": ["-ma", "-mb"], "x86_c": ["-ma", "-mb", "-mc"], "arm_neon": []}
    assert compiled_for("x86_avx2") == {"avx2", "fma"}
    assert compiled_for("x86_avx512vbmi2") == KNOWN["kAvx512"] | {"avx512vbmi2"}
    assert compiled_for("arm_neon") == {"neon"}
    assert compiled_for("arm_dotprod") == {"neon", "dotprod"}
    assert compiled_for("generic") == frozenset()
    assert KNOWN["kAmx"] == {"amx_int8", "amx_bf16"}
