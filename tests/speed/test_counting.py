"""Operations, bytes and products as they are counted, on computations whose work is known."""

import torch
import torch.nn.functional as F

from benchmarks.counting import Counted, Product, floor


def test_a_linear_layer_with_bias():
    x, weight, bias = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3)
    with torch.no_grad(), Counted() as counted:
        F.linear(x, weight, bias)
    assert counted.flops == 2 * 6 * 4 * 3
    assert counted.bytes == 4 * (6 * 4 + 3 * 4 + 3 + 6 * 3)
    assert (counted.operations, counted.copies, counted.made) == (1, 0, 1)
    assert counted.products == {Product(((6, 4), (4, 3)), (False, True)): 1}


def test_views_are_free_and_copies_are_not():
    x = torch.randn(2, 6, 4)
    with torch.no_grad(), Counted() as counted:
        x.transpose(1, 2).unflatten(2, (3, 2))[0].view(4, 3, 2)
    assert (counted.operations, counted.bytes, counted.made) == (0, 0, 0)
    with torch.no_grad(), Counted() as counted:
        x.transpose(1, 2).contiguous()
    assert (counted.operations, counted.copies, counted.bytes, counted.flops) == (1, 1, 2 * x.nbytes, 0)


def test_operations_in_place_make_nothing():
    with torch.no_grad(), Counted() as counted:
        torch.ones(5).add_(1)
    assert (counted.operations, counted.made) == (2, 1)  # the ones themselves are made


def test_attention_is_two_products_in_either_kernel():
    tensors = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    with torch.no_grad(), Counted() as fused:
        F.scaled_dot_product_attention(*tensors)
    q, k, v = (tensor.flatten(0, 1) for tensor in tensors)
    with torch.no_grad(), Counted() as plain:
        torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    assert fused.flops == plain.flops == 2 * 2 * 6 * 5 * 5 * 8
    assert fused.products == plain.products


def test_a_backward_pass_counts_as_it_is_computed():
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with Counted() as counted:
        F.linear(x, weight).sum().backward()
    assert counted.flops == 3 * 2 * 6 * 4 * 3


def test_gelu_within_a_product_counts_its_product():
    """The kernel of `opensora.models.fused` multiplies as much as the layers one by one."""
    from opensora.models.embeddings import MLP

    layers, x = MLP(4, 8, 3), torch.randn(6, 4)
    with torch.no_grad(), Counted() as counted:
        layers(x)
    assert counted.flops == 2 * 6 * (4 * 8 + 8 * 3)
    assert {product.shapes for product in counted.products} == {((6, 4), (4, 8)), ((6, 8), (8, 3))}


def test_the_floor_computes_the_products_and_convolutions_of_what_was_counted():
    image, kernel = torch.randn(2, 3, 9, 7), torch.randn(4, 3, 3, 3)
    tensors = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    with torch.no_grad(), Counted() as counted:
        for _ in range(2):
            F.conv2d(image, kernel, stride=2, padding=1).relu()
        F.scaled_dot_product_attention(*tensors)
        torch.randn(5, 2).t() @ torch.randn(5, 3)
    compute = floor(counted.products, torch.bfloat16)
    with torch.no_grad(), Counted() as again:
        compute()
    assert again.products == counted.products and again.flops == counted.flops
    assert again.operations == sum(again.products.values()) == 5
