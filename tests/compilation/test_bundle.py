"""The result is a complete folder for onnxruntime-genai where the source is one, or where that is asked for."""

import json

import pytest

import sparse_onnx
from sparse_onnx.errors import UsageError
from sparse_onnx.sparse_ops import library_path
from sparse_onnx.tools.benchmarks.make_decoder import SHAPES, write_decoder

TINY = SHAPES["tiny"]
SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
SESSION = ("model", "decoder", "session_options")


def optimize(source, out, **options):
    return sparse_onnx.optimize(source, out, threads=1, benchmark=False, **options)


def config_of(folder):
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))


def session_of(folder):
    return config_of(folder)["model"]["decoder"]["session_options"]


def source_folder(tmp_path, **options):
    folder = tmp_path / "in"
    write_decoder(folder, TINY, **options)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "model.onnx").rename(folder / "decoder.onnx")
    config = config_of(folder)
    config["model"]["decoder"]["filename"] = "decoder.onnx"
    config["model"]["decoder"]["session_options"]["log_id"] = "mine"
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("by_file", [True, False])
def test_a_folder_becomes_a_folder(tmp_path, by_file):
    folder = source_folder(tmp_path, zeros=0.8)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = []
    optimize(folder / "decoder.onnx" if by_file else folder, tmp_path / "out", progress=said.append)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "model.onnx",
        "tokenizer.json",
        "genai_config.json",
        "report.json",
    }
    assert config_of(out)["model"]["decoder"]["filename"] == "model.onnx"
    library = session_of(out)["custom_ops_library"]
    assert session_of(out)["log_id"] == "mine"
    assert (out / library).read_bytes() == library_path().read_bytes()
    assert config_of(out)["search"] == config_of(folder)["search"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not any("no tokenizer" in line for line in said)
    optimize(out, tmp_path / "again")  # of the result, too
    assert session_of(tmp_path / "again") == session_of(out)


def test_where_nothing_was_gained_no_library_is_named(tmp_path):
    folder = source_folder(tmp_path)
    optimize(folder, tmp_path / "out")
    assert "custom_ops_library" not in session_of(tmp_path / "out")
    assert not (tmp_path / "out" / library_path().name).exists()


def test_other_sources_are_no_folders(tmp_path):
    path = write_decoder(tmp_path / "in", TINY, zeros=0.8)
    (tmp_path / "in" / "genai_config.json").unlink()
    optimize(path, tmp_path / "out")
    assert not (tmp_path / "out" / "genai_config.json").exists()


def test_asked_for(tmp_path):
    path = write_decoder(tmp_path / "in", TINY, zeros=0.8)
    wanted = config_of(tmp_path / "in")["model"]["decoder"]
    (tmp_path / "in" / "genai_config.json").unlink()
    with pytest.raises(UsageError, match=r"put the config\.json and the tokenizer"):
        optimize(path, tmp_path / "out", bundle="genai")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "config.json").write_text(json.dumps(SIZES), encoding="utf-8")
    said = []
    optimize(path, tmp_path / "out", bundle="genai", progress=said.append)
    assert any("no tokenizer" in line for line in said)
    found = config_of(tmp_path / "out")["model"]["decoder"]
    session = found.pop("session_options")
    assert session["custom_ops_library"] == library_path().name
    assert found == {key: value for key, value in wanted.items() if key != "session_options"}


@pytest.mark.parametrize("text", ["[]", "no JSON"])
def test_a_damaged_config_beside_the_model(tmp_path, text):
    path = write_decoder(tmp_path / "in", TINY, zeros=0.8)
    (tmp_path / "in" / "genai_config.json").unlink()
    (tmp_path / "in" / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"config\.json"):
        optimize(path, tmp_path / "out", bundle="genai")


def test_other_bundles(tmp_path):
    path = write_decoder(tmp_path / "in", TINY)
    with pytest.raises(UsageError, match="bundle is 'zip', not 'genai'"):
        optimize(path, tmp_path / "out", bundle="zip")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 4])
def test_the_real_package_generates_the_same(tmp_path, bits):
    """The tokens that onnxruntime-genai gives are those of ONNX Runtime, and those of the original."""
    genai = pytest.importorskip("onnxruntime_genai")
    from sparse_onnx.model.model_io import load_model
    from sparse_onnx.running.generation import Generator
    from sparse_onnx.running.runtime import open_session

    folder = source_folder(tmp_path, bits=bits, zeros=0.8)
    optimize(folder, tmp_path / "out", precision="int4")
    written = tmp_path / "out" / "model.onnx"
    generate = Generator(load_model(written), open_session(written, threads=1, library=True))
    expected = list(generate([5, 6, 7, 8], 20).tokens)
    for place in (tmp_path / "out", folder) if bits == 32 else (tmp_path / "out",):
        model = genai.Model(str(place))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=24)
        generator = genai.Generator(model, parameters)
        generator.append_tokens([5, 6, 7, 8])
        while not generator.is_done():
            generator.generate_next_token()
        assert [int(token) for token in generator.get_sequence(0)][4:] == expected
