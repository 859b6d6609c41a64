"""Search for the zeros and bits of every layer that meet goals for speed, size and quality.

From measured curves and losses (:mod:`sparse_onnx.analysis.analyze`, :mod:`.losses`, :mod:`.tables`) families of plans
are made (:mod:`.plans`, :mod:`.frontier`), each of which is a recipe (:mod:`.recipes`); trials of some of them
(:mod:`.workers`), chosen one after the other (:mod:`.strategy` and :mod:`.driver`), find the one that is shipped
(:mod:`.run`). What was planned is kept (:mod:`.planned`).
"""
