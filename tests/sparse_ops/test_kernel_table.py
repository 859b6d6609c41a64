"""Every kernel source is compiled, and every kernel is in the table of its folder: no kernel goes untested."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "sparse_ops"
CSRC = FOLDER / "csrc"
TABLES = sorted(CSRC.glob("kernels/*/kernels.inc"))
# What the compiler defines, and what the names of its sources begin with.
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm"}


def rows_of(table: str) -> dict[str, list[str]]:
    """The rows of a kernels.inc by the prefix of their sources; "" for those of every processor."""
    rows: dict[str, list[str]] = {}
    where = ""
    for line in table.splitlines():
        if condition := re.fullmatch(r"#(?:if|elif) defined\(__(\w+)__\)", line):
            where = ARCHITECTURES[condition[1]]
        elif line == "#endif":
            where = ""
        elif row := re.fullmatch(r"[A-Z]+_KERNEL\((\w+)\)", line):
            rows.setdefault(where, []).append(row[1])
        else:
            assert line.startswith("//"), f"{line} is neither a row nor a condition"
    return rows


def defined_in(source: str) -> list[str]:
    return re.findall(r"^constexpr Kernel (\w+) =", source, re.MULTILINE)


def sources_of(table: Path) -> dict[str, list[str]]:
    """The kernels that the sources beside a table define, by the prefix of the source."""
    defined: dict[str, list[str]] = {}
    for source in sorted(table.parent.glob("*.cc")):
        prefix = source.stem.split("_")[0] if source.stem.startswith(("x86_", "arm_")) else ""
        defined.setdefault(prefix, []).extend(defined_in(source.read_text()))
    return defined


def compiled(cmake: str) -> list[str]:
    """The sources that a CMakeLists.txt compiles, comments and properties aside."""
    cmake = re.sub(r"#.*|set_source_files_properties\([^)]*\)", "", cmake)
    return re.findall(r"csrc/[\w/]+\.cc", cmake)


def test_there_are_tables():
    assert {table.parent.name for table in TABLES} >= {"spmm"}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.parent.name)
def test_rows_and_definitions_agree(table):
    rows, defined = rows_of(table.read_text()), sources_of(table)
    assert {where: sorted(names) for where, names in rows.items()} == {
        where: sorted(names) for where, names in defined.items()
    }
    for names in (*rows.values(), *defined.values()):
        assert len(names) == len(set(names))
    # Every processor sees its own rows and the common ones: no name twice among them.
    for prefix in ARCHITECTURES.values():
        assert not set(rows.get(prefix, ())) & set(rows[""])


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.parent.name)
def test_every_kernel_carries_its_own_name_and_instruction_set(table):
    for source in table.parent.glob("*.cc"):
        text = source.read_text()
        for name, body in re.findall(r"^constexpr Kernel (\w+) =(.*?);", text, re.MULTILINE | re.DOTALL):
            assert f'"{name}"' in body, source
            assert re.findall(r"\bIsa::(\w+)", body) == [name.split("_")[0]], source


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.parent.name)
def test_every_instruction_set_has_a_kernel(table):
    """Whatever set is active: an operator finds a kernel of it."""
    header = (CSRC / "cpu_features.h").read_text()
    listed = re.search(r"kIsas\[\] = \{([^}]*)\}", header)
    assert listed
    names = {name.split("_")[0] for names in rows_of(table.read_text()).values() for name in names}
    assert names == {*re.findall(r"Isa::(\w+)", listed[1]), "reference"}


def test_every_source_is_compiled_once():
    found = sorted(str(path.relative_to(FOLDER)) for path in CSRC.rglob("*.cc"))
    assert found == sorted(compiled((FOLDER / "CMakeLists.txt").read_text()))


def test_every_test_source_is_built():
    cmake = re.sub(r"#.*|csrc/[\w/]+\.cc", "", (FOLDER / "CMakeLists.txt").read_text())
    for path in Path(__file__).parent.glob("*.cc"):
        assert re.search(rf"\b{path.stem.removesuffix('_test')}\b", cmake), f"{path.name} is not built"


def test_a_forgotten_kernel_is_found():
    table = "// Best first.\n#if defined(__x86_64__)\nSPMM_KERNEL(avx2_t4)\n#endif\nSPMM_KERNEL(reference)\n"
    assert rows_of(table) == {"x86": ["avx2_t4"], "": ["reference"]}
    source = "constexpr Kernel a = {};\n  // constexpr Kernel b\nconstexpr Kernel c =\n"
    assert defined_in(source) == ["a", "c"]
    cmake = "set(k csrc/a/b.cc) # csrc/c.cc\nset_source_files_properties(csrc/d.cc\n X)"
    assert compiled(cmake) == ["csrc/a/b.cc"]
    with pytest.raises(AssertionError, match="neither a row nor a condition"):
        rows_of("SPMM_KERNEL(avx2_t4")
