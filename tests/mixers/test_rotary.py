import torch

from trivium.mixers.rotary import count_positions, rotate, rotate_triples


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_angle_is_the_position_times_a_rate_that_falls_with_the_channel():
    x = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]], dtype=torch.float64)
    turned = rotate(x, torch.tensor([[3]]), base=100.0)
    angles = torch.tensor([3.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(turned[0, 0, 0], torch.cat((angles.cos(), angles.sin())), rtol=0, atol=1e-12)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    q, k = draw(1, 6, 2, 8), draw(1, 6, 2, 8)
    places = torch.arange(6)[None]
    near, far = (torch.einsum("bihd,bjhd->bhij", rotate(q, p, 1e4), rotate(k, p, 1e4)) for p in (places, places + 37))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-10)
    assert not torch.allclose(near, torch.einsum("bihd,bjhd->bhij", q, k))


def test_determinants_of_rotated_triples_depend_on_the_distances_alone_and_trilinear_products_do_not():
    q, a, b = draw(1, 5, 1, 7), draw(1, 5, 1, 7), draw(1, 5, 1, 7) + 1
    places = torch.arange(5)[None]

    def products(shift: int, turn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, z = (rotate_triples(v, places + shift, 50.0) if turn else v for v in (q, a, b))
        triples = [v[..., :6].unflatten(-1, (2, 3))[0, :, 0] for v in (x, y, z)]
        cross = torch.linalg.cross(triples[1][:, None], triples[2][None])
        return torch.einsum("itx,jktx->ijk", triples[0], cross), torch.einsum("ihd,jhd,khd->ijk", x[0], y[0], z[0])

    (near, near_trilinear), (far, far_trilinear) = products(0, True), products(11, True)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-10)
    assert not torch.allclose(near, products(0, False)[0])
    assert not torch.allclose(near_trilinear, far_trilinear)


def test_positions_are_counted_from_the_start_of_each_document():
    ids = torch.tensor([[7, 7, 7, 2, 2, 7], [1, 2, 2, 2, 2, 2]])
    counted = count_positions(2, 6, ids.device, None, ids)
    assert counted.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert count_positions(2, 3, ids.device, torch.tensor([4, 0])).tolist() == [[4, 5, 6], [0, 1, 2]]
    assert count_positions(2, 3, ids.device).tolist() == [[0, 1, 2]]
