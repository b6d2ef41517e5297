"""A quantised weight: the floats that its integers, scales, zeros and order of columns stand for."""

import pytest
import torch

from posttrain.models.quantized_weight import QuantizedWeight, attach_quantized, forget_quantized, quantized_modules

VALUES = torch.tensor([[-8, 7, 0, 1], [2, -3, 4, -5]], dtype=torch.int8)
SCALES = torch.tensor([[0.5, 2.0], [0.25, 1.0]])
ZEROS = torch.tensor([[-8, 1], [2, -4]], dtype=torch.int8)


def test_values_by_hand() -> None:
    symmetric = QuantizedWeight(VALUES, SCALES, None, 2, 4)
    assert symmetric.dense().tolist() == [[-4.0, 3.5, 0.0, 2.0], [0.5, -0.75, 4.0, -5.0]]
    shifted = QuantizedWeight(VALUES, SCALES, ZEROS, 2, 4)
    assert shifted.dense().tolist() == [[0.0, 7.5, -2.0, 0.0], [0.0, -1.25, 8.0, -1.0]]
    assert symmetric.nbytes == 4 + 16 and shifted.nbytes == 4 + 16 + 2


def test_order_names_the_group_of_each_column() -> None:
    order = torch.tensor([1, 0, 1, 0])
    found = QuantizedWeight(VALUES, SCALES, ZEROS, 2, 4, order).dense()
    assert found.tolist() == [[-18.0, 7.5, -2.0, 4.5], [6.0, -1.25, 8.0, -1.75]]
    in_turn = torch.tensor([0, 0, 1, 1])
    same = QuantizedWeight(VALUES, SCALES, ZEROS, 2, 4, in_turn).dense()
    assert torch.equal(same, QuantizedWeight(VALUES, SCALES, ZEROS, 2, 4).dense())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 3 do not divide 4"):
        QuantizedWeight(VALUES, SCALES, None, 3, 4)
    with pytest.raises(ValueError, match="shape"):
        QuantizedWeight(VALUES, SCALES, None, 4, 4)
    with pytest.raises(ValueError, match="4 or 8"):
        QuantizedWeight(VALUES, SCALES, None, 2, 3)  # type: ignore[arg-type]


def test_a_module_keeps_its_dense_weight_beside() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(4, 2))
    weight = QuantizedWeight(VALUES, SCALES, None, 2, 4)
    attach_quantized(linear[0], weight)
    assert torch.equal(linear[0].weight, weight.dense()) and linear[0].weight.requires_grad
    assert [(n, w is weight) for n, _, w in quantized_modules(linear)] == [("0", True)]
    forget_quantized(linear)
    assert not list(quantized_modules(linear))
