"""``python -m sparse_onnx``: the command line."""

from sparse_onnx.tools.cli import main

if __name__ == "__main__":
    main()
