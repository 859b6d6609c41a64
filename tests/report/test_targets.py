"""Time by input shape, as the page has it."""

from sparse_onnx.report.view.targets import target_rows, targets_answer


def row(speedup, phase=None, tokens=0, **shapes):
    made = {
        "input_shapes": shapes,
        "weight": None,
        "speedup": speedup,
        "speedup_low": speedup,
        "speedup_high": speedup,
    }
    if phase is not None:
        rates = (100.0, 100.0 * speedup) if speedup else (None, None)
        made |= {"phase": phase, "tokens": tokens}
        made |= dict(zip(("dense_tokens_per_second", "optimized_tokens_per_second"), rates, strict=True))
    return made


REQUEST = [row(2.0, "prefill", 128, input_ids=[1, 128]), row(1.5, "decode", 1, input_ids=[1, 1])]


def test_one_target_needs_no_table():
    assert target_rows([row(2.0, x=[1, 4])]) == []


def test_shapes_are_named():
    rows = [row(2.0, x=[1, 4], y=[2]), row(3.0, x=[8, 4], y=[2])]
    assert [target["name"] for target in target_rows(rows)] == ["x [1, 4], y [2]", "x [8, 4], y [2]"]
    assert targets_answer(rows) == "2.00× to 3.00× the speed at 2 input shapes"


def test_a_request_is_told_in_tokens():
    assert [target["name"] for target in target_rows(REQUEST)] == [
        "128 of prompt: 100.0 tokens/s, now 200.0",
        "decode: 100.0 tokens/s, now 150.0",
    ]
    assert targets_answer(REQUEST) == "First token 2.00× as fast, each behind it 1.50×"


def test_a_request_that_was_not_timed():
    rows = [row(None, "prefill", 128, input_ids=[1, 128]), row(None, "decode", 1, input_ids=[1, 1])]
    assert [target["name"] for target in target_rows(rows)] == ["128 of prompt", "decode"]
    assert targets_answer(rows) == "2 input shapes were decided for"


def test_two_prompts_are_no_request():
    rows = [row(2.0, "prefill", 128, input_ids=[1, 128]), row(3.0, "prefill", 512, input_ids=[1, 512])]
    assert targets_answer(rows) == "2.00× to 3.00× the speed at 2 input shapes"
