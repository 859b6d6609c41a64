"""Search for the zeros of every layer that meet goals for speed, size and quality.

From measured curves (:mod:`sparse_onnx.analysis.analyze`) two families of plans are made (:mod:`.plans`,
:mod:`.frontier`, :mod:`.losses`); trials of some of them (:mod:`.workers`), chosen one after the other
(:mod:`.strategy` and :mod:`.driver`), find the one that is shipped (:mod:`.run`).
"""
