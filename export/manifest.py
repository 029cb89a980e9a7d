"""The manifest of a bundle, schema 2: what `mnif export` writes and everything else reads.

This file stands by itself (Python 3.8, standard library) and is copied into every bundle's ``device/``. A manifest is
one JSON object; paths are relative to the bundle and use "/".

``schema``                2
``package``               {"name", "version"} of the exporter
``source_revision``       the git commit of the exporter's sources, or null where there is none
``command``               the command line, as typed
``decoder_fingerprint``   of the decoder (:meth:`mnif.modeling.MNIFModel.fingerprint`)
``signal``                "image", "voxels", "radiance", or a signal of one's own
``grid``                  of *decoder* and *sampler* values: {"dimensions" d, "resolution" [d pixels per axis],
                          "cells" per axis, "overlap" in widths of a cell, "pixel_centre", "axes" (two conventions in
                          words)}
``values``                {"channels" C, "padded_channels" C or 4 (further channels are 0 and to be cut off), "range"
                          [-1, 1], "pixel" (formula in words)}
``radiance``              null, or {"bound", "near", "far", "background" in the colours' range, "samples" per ray,
                          "size" [height, width], "intrinsics" [fx, fy, cx, cy], "camera_distance"}
``sampling``              null without a prior, or {"latent_dim", "num_inference_steps" [as exported], "scheduler",
                          "seed" of the baked samples}; the noise of sample i of seed s is
                          ``numpy.random.default_rng([s, i]).standard_normal(latent_dim, dtype=float32)``
``precision``             precision → {part of a graph → its type}, for each precision that occurs
``graphs``                name → graph, see below
``measured``              name → {"tensorrt_rtx" report or null}; never the same twice
``inputs``                what the bundle depends on; the same inputs make the same bundle
``files``                 path → {"sha256", "bytes"} of every file but the manifest
``digest``                :func:`manifest_digest`

While an export puts its files in the place of older ones, the manifest has only ``schema`` "unfinished",
``decoder_fingerprint``, and ``files`` of both; that of a killed export stays so until the next one.

A graph is
``kind``                  "decoder"   coefficients → values on the grid
                          "sampler"   noise → values on the grid (radiance: → coefficients, for *rays* and *points*)
                          "baked"     coordinates of each cell's own → values, one instance's weights inside
                          "rays"      origins, directions → colours (and coefficients first, unless it is baked)
                          "points"    points of the world → colours and density (likewise)
                          "prior"     noise → coefficients, for *field*
                          "field"     coefficients, coordinates of each cell's own → values of each cell
``precision``             "fp32" or "mixed"
``storage``               "fp32", "fp16" or "int8": how the large matrices are stored
``file``                  "onnx/NAME.onnx"
``opset``, ``ir_version`` 17, 8
``inputs``, ``outputs``   [{"name", "type", "shape"}] in the graph's order; a word in a shape is a dynamic axis
``profile``               input → {"minimum", "optimum", "maximum"} shapes
``steps``                 evaluations of the denoiser; null unless it is a sampler
``instance``              what is baked: {"seed", "sample"} or {"id"}; null where nothing is
``half``                  names of the nodes that multiply in float16, for builders that set types layer by layer
``reference``             prefix in reference.npz: ``PREFIX.INPUT`` float32 and ``PREFIX.OUTPUT`` float64; null for
                          baked graphs after the first few. Graphs that differ in precision or storage alone share one
``psnr``                  dB against float64 with the model's own weights (``quality.py``) on the reference, in the
                          graph's own precision; null where ``reference`` is
``tolerance``             {"max_abs", "psnr"}: what any backend must reach against the reference, the largest absolute
                          difference and the least PSNR; null where ``reference`` is
"""

import hashlib
import json

SCHEMA = 2
UNFINISHED = "unfinished"


def manifest_digest(manifest: dict) -> str:
    """The SHA-256 of a manifest without its own ``digest``; it finds damage, it does not prove where it came from."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
