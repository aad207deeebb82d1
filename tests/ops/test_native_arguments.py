"""What the bindings refuse, by name."""

import numpy as np
import pytest

from thermocline import _native


def floats(*shape):
    return np.zeros(shape, np.float32)


def matrix(rows=4, cols=8):
    return _native.Matrix(np.zeros((rows, 4 * cols), np.uint8), 0, rows, cols)


@pytest.fixture(scope="module")
def context():
    return _native.Context(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 32), np.uint8), 7, 4, 8), "ggml_type 7"),
        ((np.zeros((4, 33), np.uint8), 0, 4, 8), r"data has shape \(4, 33\), expected \(4, 32\)"),
        ((np.zeros((4, 34), np.uint8), 8, 4, 33), "whole blocks of 32"),
        ((np.zeros((4, 32), np.int8), 0, 4, 8), "data is not uint8"),
        ((np.zeros((4, 64), np.uint8)[:, ::2], 0, 4, 8), "data is not C-contiguous"),
        ((np.zeros((0, 0), np.uint8), 0, 0, -1), "columns -1"),
    ],
)
def test_matrix_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.Matrix(*arguments)


def test_matrix_keeps_its_bytes_alive_and_reads_maps_that_cannot_be_written(context):
    data = np.ones((4, 8), np.float32).view(np.uint8)
    data.flags.writeable = False
    kept = _native.Matrix(data, 0, 4, 8)
    del data
    out = floats(1, 4)
    context.linear(np.ones((1, 8), np.float32), (kept,), (out,), None, False)
    assert (out == 8).all()
    assert (kept.rows, kept.cols, kept.row_bytes, kept.ggml_type) == (4, 8, 32, 0)


CACHE = (floats(2, 10, 8), floats(2, 10, 8))
REFUSALS = {
    "x has shape": lambda c: c.linear(floats(8), (matrix(),), (floats(1, 4),), None, False),
    "x is not float32": lambda c: c.linear(np.zeros((1, 8)), (matrix(),), (floats(1, 4),), None, False),
    "x is not C-contiguous": lambda c: c.linear(floats(8, 2).T, (matrix(),), (floats(2, 4),), None, False),
    "matrices have other columns": lambda c: c.linear(floats(1, 9), (matrix(),), (floats(1, 4),), None, False),
    "outs has shape": lambda c: c.linear(floats(1, 8), (matrix(),), (floats(1, 5),), None, False),
    "outs are not as many": lambda c: c.linear(floats(1, 8), (matrix(),), (), None, False),
    "biases has shape": lambda c: c.linear(floats(1, 8), (matrix(),), (floats(1, 4),), (floats(3),), False),
    "biases are not as many": lambda c: c.linear(floats(1, 8), (matrix(),), (floats(1, 4),), (), False),
    "tokens holds an index": lambda c: c.embed(matrix(), np.array([4], np.int32), floats(1, 8)),
    "tokens is not int32": lambda c: c.embed(matrix(), np.array([0]), floats(1, 8)),
    "weight has shape": lambda c: c.rms_norm(floats(2, 8), floats(7), 1e-5, floats(2, 8)),
    "bias has shape": lambda c: c.layer_norm(floats(2, 8), floats(8), floats(1, 8), 1e-5, floats(2, 8)),
    "out has shape": lambda c: c.rms_norm(floats(2, 8), floats(8), 1e-5, floats(8)),
    "positions holds": lambda c: c.rope(floats(1, 2, 8), floats(3, 2, 4), np.array([3], np.int32), False),
    "table rotates more": lambda c: c.rope(floats(1, 2, 8), floats(3, 2, 5), np.array([0], np.int32), False),
    "start leaves no room": lambda c: c.attention(
        floats(2, 4, 8), floats(2, 2, 8), floats(2, 2, 8), *CACHE, 9, 1.0, 0, floats(2, 4, 8)
    ),
    "q has heads": lambda c: c.attention(
        floats(1, 3, 8), floats(1, 2, 8), floats(1, 2, 8), *CACHE, 0, 1.0, 0, floats(1, 3, 8)
    ),
    "keys has another head_dim": lambda c: c.attention(
        floats(1, 4, 6), floats(1, 2, 6), floats(1, 2, 6), *CACHE, 0, 1.0, 0, floats(1, 4, 6)
    ),
    "window is negative": lambda c: c.attention(
        floats(1, 4, 8), floats(1, 2, 8), floats(1, 2, 8), *CACHE, 0, 1.0, -1, floats(1, 4, 8)
    ),
    "values is neither": lambda c: c.attention(
        floats(1, 4, 8), floats(1, 2, 8), floats(1, 2, 8), CACHE[0], np.zeros((2, 10, 8)), 0, 1.0, 0, floats(1, 4, 8)
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_context_refuses(context, message):
    with pytest.raises(ValueError, match=message):
        REFUSALS[message](context)


def ffn(context, **changes):
    arguments = {
        "x": floats(1, 8), "gate": matrix(), "up": matrix(), "down": matrix(), "records": True, "activation": 1,
        "both": False, "threshold": 0.0, "up_bias": None, "rows": None, "active": None, "out": floats(1, 8),
        "skip_zeros": True, "hidden": None,
    }  # fmt: skip
    return context.ffn(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": np.array([1, 1], np.int32)}, "active is not strictly ascending"),
        ({"active": np.array([2, 1], np.int32)}, "active is not strictly ascending"),
        ({"active": np.array([3, 4], np.int32)}, "active holds an index out of range"),
        ({"active": np.array([-1, 2], np.int32)}, "active holds an index out of range"),
        ({"active": np.array([1, 2])}, "active is not int32"),
        ({"gate": matrix(5)}, "gate has another shape"),
        ({"gate": None, "both": True}, "both needs a gate"),
        ({"records": False}, "down does not have the shape"),
        ({"down": matrix(8, 4)}, "down does not have the shape"),
        ({"activation": 4}, "activation is unknown"),
        ({"threshold": -1.0}, "threshold is negative"),
        ({"threshold": float("nan")}, "threshold is negative or not a number"),
        ({"up_bias": floats(5)}, "up_bias has shape"),
        ({"rows": np.array([0, 1, 2, 4], np.int32)}, "rows do not tell"),
        ({"rows": np.array([0, 1, 2, -1], np.int32)}, "rows do not tell"),
        ({"rows": np.array([0, 9], np.int32), "active": np.array([1], np.int32)}, "rows do not tell"),
        ({"rows": np.array([0, 1]), "active": np.array([1], np.int32)}, "rows is not int32"),
        ({"rows": np.zeros(4, np.int32), "records": False, "down": matrix(8, 4)}, "rows are of neuron records"),
        ({"hidden": floats(1, 5)}, "hidden has shape"),
        ({"out": floats(1, 4)}, "out has shape"),
        ({"x": floats(1, 4)}, "x has shape"),
    ],
)
def test_ffn_refuses(context, changes, message):
    with pytest.raises(ValueError, match=message):
        ffn(context, **changes)


def test_ffn_takes_what_is_right(context):
    assert ffn(context) == (4, 0, 0, 0)
    assert ffn(context, active=np.array([0, 3], np.int32), hidden=floats(1, 4)) == (2, 0, 0, 0)


def test_outputs_that_cannot_be_written_are_refused(context):
    out = floats(1, 4)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="outs holds what is no writable array"):
        context.linear(floats(1, 8), (matrix(),), (out,), None, False)
    with pytest.raises(TypeError):
        context.embed(matrix(), np.array([0], np.int32), out)


def test_context_names_the_levels(context):
    with pytest.raises(ValueError, match="isa is 'sse9'; this CPU has: baseline"):
        _native.Context(1, "sse9")
    with pytest.raises(ValueError, match="threads"):
        _native.Context(0)
    with pytest.raises(ValueError, match="fetching is 'third'; allowed: auto, first, second"):
        _native.Context(1, "auto", True, "third")
    assert context.isa == _native.isa_levels()[-1]
    assert all(isinstance(present, bool) for present in _native.cpu_features().values())


@pytest.mark.parametrize("isa", _native.isa_levels())
def test_tiles_have_a_rate_where_they_are(isa):
    context = _native.Context(1, isa)
    for int8 in (True, False):
        assert (_native.tile_rate(context, int8) > 0) == (isa == "amx")


def test_rows_are_read_alone(context):
    some = matrix()
    for ids in (None, np.arange(some.rows, dtype=np.int32), np.zeros(0, np.int32)):
        rate = _native.read_rows(context, some, ids)
        assert rate >= 0
        assert (rate > 0) == (ids is None or len(ids) > 0)
    for wrong in (-1, some.rows):
        with pytest.raises(ValueError, match="ids holds an index out of range"):
            _native.read_rows(context, some, np.array([0, wrong], np.int32))


def test_only_the_neurons_of_a_block_are_limited_not_the_rows_it_lies_among(context):
    """Sums of whole numbers have room for 65,536 rows; slots of records may be many more."""
    count = 65_537
    many = _native.Matrix(np.zeros((count, 34), np.uint8), 8, count, 32)
    x, out = floats(1, 32), floats(1, 32)
    block = {"gate": None, "up": many, "down": many, "records": True, "activation": 1, "both": False, "threshold": 0.0}
    rows = np.array([count - 1], np.int32)
    context.ffn(x, **block, up_bias=None, rows=rows, active=None, out=out, skip_zeros=True, hidden=None)
    with pytest.raises(ValueError, match="down has more than 65,536 neurons"):
        context.ffn(x, **block, up_bias=None, rows=None, active=None, out=out, skip_zeros=True, hidden=None)
