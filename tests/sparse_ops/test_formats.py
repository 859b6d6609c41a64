"""What every stored format keeps, and that nobody else knows its parts."""

import ast
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings

from sparse_onnx import sparse_ops
from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
from sparse_onnx.sparse_ops.formats.base import ONE_RUN, FormatError, Outputs
from sparse_onnx.sparse_ops.formats.registry import FORMATS, SPARSE_FORMAT
from sparse_onnx.sparse_ops.library import select_for
from sparse_onnx.sparse_ops.ops.base import SparseOperator
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES, OPERATORS

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 1e-45, 3e38])
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=SPECIAL)
OUTPUTS = st.sampled_from([ONE_RUN, Outputs(maps=True), Outputs(5), Outputs(6, apart=True, maps=True)])

every_format = pytest.mark.parametrize("stored", FORMATS, ids=lambda stored: stored.name)


def sizes_of(packed):
    return {name: packed.attributes()[name] for name in packed.stored_format.sizes}


def assert_same(found, expected):
    """Bit for bit, but for the sign of zero."""
    zero = np.float32(0)
    np.testing.assert_array_equal((found + zero).view(np.int32), (expected + zero).view(np.int32))


@every_format
def test_a_format_describes_itself(stored):
    assert stored.sizes[:2] == ("K", "N")
    assert stored.parts[0].dtype is np.float32
    names = [*(part.name for part in stored.parts), *stored.sizes, "bias", "X"]
    assert len(names) == len(set(names))
    assert len([one for one in FORMATS if set(one.variants) & set(stored.variants)]) == 1
    assert len([one for one in FORMATS if one.word == stored.word]) == 1


def test_the_format_of_sparse_weights_is_one_of_them():
    assert SPARSE_FORMAT in FORMATS


@every_format
@given(weight=WEIGHTS, outputs=OUTPUTS)
@settings(max_examples=100, deadline=None)
def test_what_is_packed_is_read_and_unpacked_exactly(stored, weight, outputs):
    packed = stored.pack(weight, outputs)
    packed.validate()
    sparse_ops.check(packed)
    arrays, attributes = packed.arrays(), packed.attributes()
    assert [*arrays] == [part.name for part in stored.parts]
    assert [array.dtype.type for array in arrays.values()] == [part.dtype for part in stored.parts]
    assert [*attributes] == [*stored.sizes, "format"]
    assert packed.shape == (attributes["K"], attributes["N"]) == weight.shape
    assert packed.nbytes == sum(array.nbytes for array in arrays.values())
    read = stored.read(attributes["format"], sizes_of(packed), list(arrays.values()), ())
    assert_same(read.unpack(), weight)


@every_format
@pytest.mark.parametrize("sizes", [(40, 24), (64, 64, 64), (13, 128)])
def test_linears_that_fit_become_one_weight(stored, sizes, sparse):
    dense = [sparse(48, n, 0.3, seed) for seed, n in enumerate(sizes)]
    packed = [stored.pack(weight) for weight in dense]
    widest = sizes_of(max(packed, key=lambda one: one.shape[1]))
    fits = [stored.may_join(sizes_of(one), widest) for one in packed]
    whole = stored.join([one for one, fit in zip(packed, fits, strict=True) if fit])
    sparse_ops.check(whole)
    kept = [weight for weight, fit in zip(dense, fits, strict=True) if fit]
    assert whole.linears == tuple(weight.shape[1] for weight in kept)
    assert_same(whole.unpack(), np.concatenate(kept, axis=1))
    split = whole.linears if len(whole.linears) > 1 else ()
    attributes = whole.attributes()
    again = stored.read(attributes["format"], sizes_of(whole), list(whole.arrays().values()), split)
    assert_same(again.unpack(), whole.unpack())


@every_format
def test_weights_of_other_inputs_do_not_fit(stored, sparse):
    one, other = stored.pack(sparse(48, 64, 0.3)), stored.pack(sparse(49, 64, 0.3))
    assert stored.may_join(sizes_of(one), sizes_of(one))
    assert not stored.may_join(sizes_of(one), sizes_of(other))
    with pytest.raises(ValueError, match="equal"):
        stored.join([one, other])


@every_format
def test_variants_are_read_as_they_say(stored):
    for variant in stored.variants:
        assert stored.reads_alike(variant, variant)
        assert stored.reads_alike(variant, stored.name)
        assert stored.reads_alike(stored.name, variant) == (variant == stored.name)
    assert not stored.reads_alike("newer", stored.name)


@every_format
def test_the_library_refuses_a_format_that_it_does_not_know(stored, sparse):
    packed = stored.pack(sparse(16, 8, 0.5))

    class Newer(type(packed)):
        def attributes(self):
            return {**super().attributes(), "format": "newer"}

    newer = Newer(**{name: getattr(packed, name) for name in packed.__dataclass_fields__})
    with pytest.raises(FormatError, match="no format is named newer"):
        sparse_ops.check(newer)


@every_format
@pytest.mark.parametrize("rows", [1, 77])
def test_a_kernel_is_named(stored, rows, sparse):
    sizes = sizes_of(stored.pack(sparse(100, 48, 0.3)))
    assert select_for(stored, stored.joint_sizes([sizes]), rows) in sparse_ops.info().kernels


@every_format
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_size_is_known_without_packing(stored, sparsity, sparse):
    weight = sparse(768, 384, 1 - sparsity)
    expected = stored.expected_nbytes(768, 384, float((weight == 0).mean()))
    assert expected == pytest.approx(stored.pack(weight).nbytes, rel=0.01)


@every_format
def test_a_second_weight_has_names_of_its_own(stored):
    made = {}
    for prefix in ("", "down_"):
        inputs = ", ".join(prefix + part.name for part in stored.parts)
        attributes = ", ".join(prefix + name for name in stored.sizes)
        text = f"""<domain: "{DOMAIN}", opset_import: ["" : 17]>
            f <{attributes}> ({inputs}) => ({prefix}W) {{ {stored.decoder(prefix)} }}"""
        body = onnx.parser.parse_function(text)
        made[prefix] = {name for node in body.node for name in node.output}
    assert made["down_"] == {f"down_{name}" for name in made[""]}


def test_every_operator_has_an_op_type_with_every_format():
    expected = [
        name
        for operator in OPERATORS
        for base in operator.op_types
        for name in (
            [stored.op_type(base) for stored in FORMATS] if isinstance(operator, SparseOperator) else [base]
        )
    ]
    assert sorted(OP_TYPES) == sorted(expected)
    for op_type in OP_TYPES.values():
        body = op_type.function_body(17)
        assert (body.domain, body.name) == (DOMAIN, op_type.name)
        context = onnx.checker.C.CheckerContext()
        context.ir_version = 8
        context.opset_imports = {"": 17, DOMAIN: VERSION}
        onnx.checker.check_function(body, context)


COMMON = {"values", "counts", "rows", "width", "block", "K", "N"}
"""Words that mean other things elsewhere, too: as attributes or texts they tell nothing."""


def words_of(source: str) -> set[str]:
    """The attributes, keywords, whole texts and imported modules of a source."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword):
            found.add(node.arg or "")
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@every_format
def test_nobody_else_knows_the_parts(stored):
    known = {*stored.variants, *stored.sizes, *(part.name for part in stored.parts), type(stored).__module__}
    known -= COMMON
    assert known
    formats = ROOT / "sparse_ops/formats"
    for folder in ("sparse_ops", "passes", "src", "exporter", "tools/benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if formats not in path.parents:
                assert not known & words_of(path.read_text()), path


def test_one_who_knows_is_found():
    assert "chunk" in words_of("x = packed.chunk")
    assert "offsets" in words_of("x = ['offsets']")
    assert "chunk" in words_of("pack(w, chunk=3)")
    assert "chunk" not in words_of("for chunk in chunks: pass")
    assert "a.b" in words_of("from a.b import c")
