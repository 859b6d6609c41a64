"""The promises that every pass makes, and that the base class checks."""

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.errors import PassError, UsageError
from sparse_onnx.passes.base import Pass, PassContext, PassResult, Pipeline, Stage, fingerprint

TEXT = """<ir_version: 9, opset_import: ["" : 17]>
g (float[2, 3] X) => (float[2, 2] Y) { H = MatMul(X, W) Y = Relu(H) }"""


@pytest.fixture
def model(from_text):
    return from_text(TEXT, W=np.ones((3, 2), np.float32))


@dataclasses.dataclass(frozen=True)
class Step(Pass):
    """Does what ``action`` says and claims what ``claim`` says."""

    name: ClassVar[str] = "test.step"
    stage: ClassVar[Stage] = Stage.PRUNE
    action: str = "nothing"
    claim: bool = False

    def check(self):
        if self.action == "forbidden":
            raise UsageError("action must not be forbidden")

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        weight = model.graph.initializers["W"]
        if self.action == "tensor":
            weight.const_value = ir.tensor(weight.const_value.numpy() * 2, name="W")
        elif self.action == "metadata":
            weight.metadata_props["key"] = "value"
        elif self.action == "rename":
            model.graph.node(0).name = "renamed"
        elif self.action == "attribute":
            model.graph.node(0).attributes["a"] = ir.AttrInt64("a", 1)
        elif self.action == "remove":
            relu = model.graph.node(1)
            relu.inputs[0].producer().outputs[0].name = "Y2"
        elif self.action == "crash":
            raise KeyError("gone")
        elif self.action == "refuse":
            raise UsageError("no such layer")
        elif self.action == "other model":
            return PassResult(model.clone(), False)
        elif self.action == "no result":
            return None
        return PassResult(model, self.claim, {"count": 1}, (self.declined("W", "because"),))


@dataclasses.dataclass(frozen=True)
class Late(Step):
    name: ClassVar[str] = "test.late"
    stage: ClassVar[Stage] = Stage.LOWER


@pytest.mark.parametrize("action", ["tensor", "metadata", "rename", "attribute", "remove"])
def test_a_change_must_be_reported(model, action):
    with pytest.raises(PassError, match=r"test\.step reports the model as not modified"):
        Step(action)(model)


@pytest.mark.parametrize("action", ["tensor", "metadata", "rename", "attribute", "remove"])
def test_a_reported_change_is_fine(model, action):
    result = Step(action, claim=True)(model)
    assert result.modified
    assert result.seconds >= 0


def test_a_change_that_did_not_happen_must_not_be_reported(model):
    with pytest.raises(PassError, match="as modified, which is not true"):
        Step(claim=True)(model)


@pytest.mark.parametrize("action", ["other model", "no result"])
def test_the_result_must_carry_the_given_model(model, action):
    with pytest.raises(PassError, match="must return a PassResult"):
        Step(action)(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "forbidden"}, "test.step: action must not be forbidden"),
        ({"action": 3}, "test.step: action must be a string, not 3"),
        ({"claim": 1}, "test.step: claim must be true or false, not 1"),
    ],
)
def test_options_are_checked_when_a_pass_is_built(options, message):
    with pytest.raises(UsageError) as caught:
        Step(**options)
    assert str(caught.value) == message


def test_options_are_told_by_name():
    assert Step("tensor").options() == {"action": "tensor", "claim": False}


def test_a_pipeline_sums_up_its_passes(model):
    result = Pipeline((Step("tensor", True), Pipeline((Step(),)), Late()))(model)
    assert result.modified
    assert [name for name, _ in result.steps] == ["test.step", "pipeline", "test.late"]
    assert [place.pass_name for place in result.declined] == ["test.step", "test.step", "test.late"]
    assert result.statistics["test.late.count"] == 1


def test_an_empty_pipeline_changes_nothing(model):
    before = fingerprint(model)
    result = Pipeline(())(model)
    assert not result.modified
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "passes", [(Late(), Step()), (Pipeline((Late(),)), Step()), (Late(), Pipeline((Step(),)))]
)
def test_the_order_of_stages_is_checked(passes):
    with pytest.raises(UsageError, match=r"test\.step \(prune\) cannot run after test\.late \(lower\)"):
        Pipeline(passes)


def test_a_crash_names_the_pass_and_those_before_it(model):
    with pytest.raises(
        PassError, match=r"pass test\.late failed after test\.step: KeyError: 'gone'"
    ) as caught:
        Pipeline((Step(), Late("crash")))(model)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_user_stays_one(model):
    with pytest.raises(UsageError, match=r"no such layer \(in pass test\.late after test\.step\)"):
        Pipeline((Step(), Late("refuse")))(model)
