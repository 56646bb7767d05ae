"""LPIPS: equal to its equation with random weights, read from the files people have, and refusals."""

import numpy as np
import pytest
import torch

from vqkernels.models import LPIPS

CHANNELS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


@pytest.fixture(scope="module")
def weights():
    """What torchvision and the lpips package keep, with random numbers in it."""
    generator = torch.Generator().manual_seed(3)
    vgg, place, have = {}, 0, 3
    for want in CHANNELS:
        if want == "M":
            place += 1
            continue
        scale = (2 / (9 * have)) ** 0.5
        vgg[f"features.{place}.weight"] = torch.randn(want, have, 3, 3, generator=generator) * scale
        vgg[f"features.{place}.bias"] = torch.randn(want, generator=generator) / 10
        place, have = place + 2, want
    vgg |= {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    sizes = enumerate((64, 128, 256, 512, 512))
    linear = {f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for n, c in sizes}
    return vgg, linear


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, content in zip(("vgg16.pth", "vgg.pth"), weights):
        torch.save(content, folder / name)
    return folder / "vgg16.pth", folder / "vgg.pth"


def formula(weights, x, y):
    """Eq. 1 of the paper as sums over shifted images, in NumPy."""
    vgg, linear = ({name: value.double().numpy() for name, value in part.items()} for part in weights)
    mean, std = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    both = [(image.double().numpy() - mean[:, None, None]) / std[:, None, None] for image in (x, y)]
    distance, place, stage = 0.0, 0, 0
    for following in (*CHANNELS[1:], "M", None):
        if f"features.{place}.weight" in vgg:
            weight, bias = vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"]
            for n, image in enumerate(both):
                padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
                height, width = image.shape[1:]
                total = np.broadcast_to(bias[:, None, None], (len(bias), height, width)).copy()
                for i in range(3):
                    for j in range(3):
                        part = padded[:, i : i + height, j : j + width]
                        total += np.tensordot(weight[:, :, i, j], part, axes=1)
                both[n] = np.maximum(total, 0)
            place += 2
        if following == "M":
            units = [image / (np.sqrt((image**2).sum(0)) + 1e-10) for image in both]
            squares = (units[0] - units[1]) ** 2
            distance += (linear[f"lin{stage}.model.1.weight"][0] * squares).sum(0).mean()
            stage += 1
            for n, image in enumerate(both):
                c, h, w = image.shape
                image = image[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2)
                both[n] = image.max((2, 4))
            place += 1
    assert stage == 5
    return distance


def test_equals_its_equation(weights, files):
    distance = LPIPS.from_files(*files).double()
    x, y = torch.rand(2, 2, 3, 20, 18, dtype=torch.float64).mul(2).sub(1)
    expected = torch.tensor([formula(weights, a, b) for a, b in zip(x, y)])
    found = distance(x, y)
    # 13 layers of sums of at most 9 * 512 products, each from the one before; the moments come from float32
    bound = 13 * 9 * 512 * torch.finfo(torch.float64).eps + 2 * torch.finfo(torch.float32).eps
    assert ((found - expected).abs() <= bound * expected).all()
    assert (distance(x, x) == 0).all()


def test_gradients_reach_the_images_alone(files):
    distance = LPIPS.from_files(*files)
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    distance(x, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_gradients_are_finite_where_all_features_are_zero(weights, tmp_path):
    vgg = {
        name: -value.abs() if name == "features.0.bias" else value * 0 for name, value in weights[0].items()
    }
    torch.save(vgg | weights[1], tmp_path / "both.pth")
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    LPIPS.from_files(tmp_path / "both.pth")(x, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert (x.grad == 0).all()


def test_every_way_to_pass_the_weights_is_the_same(weights, files, tmp_path):
    first = LPIPS.from_files(*files).state_dict()
    torch.save(weights[0] | weights[1], tmp_path / "both.pth")
    # the names of the lpips package's own modules
    places = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3}
    package = {
        f"net.slice{places.get(int(name.split('.')[1]), 4)}.{name.split('.', 1)[1]}": value
        for name, value in weights[0].items()
        if name.startswith("features")
    }
    torch.save(package | weights[1] | {"scaling_layer.shift": torch.zeros(3)}, tmp_path / "package.pth")
    for path in (tmp_path / "both.pth", str(tmp_path / "package.pth"), files[0].parent):
        other = LPIPS.from_files(path).state_dict()
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


class Foreign:
    """What a pickle could run."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_refusals(weights, files, tmp_path):
    paths = {name: tmp_path / f"{name}.pth" for name in ("list", "text", "pickle", "wide", "empty")}
    torch.save([1, 2], paths["list"])
    paths["text"].write_text("<html>not found</html>")
    torch.save({"features.0.weight": Foreign()}, paths["pickle"])
    torch.save({**weights[0], **weights[1], "features.0.bias": torch.zeros(3)}, paths["wide"])
    paths["empty"].touch()
    for error, arguments, said in (
        (FileNotFoundError, (tmp_path / "none.pth",), "LPIPS: weights must name a file; got"),
        (ValueError, (files[0],), "LPIPS: weights must hold the 5 linear layers of lpips; got"),
        (ValueError, (files[1],), "LPIPS: weights must hold the 13 convolutions of VGG-16; got"),
        (ValueError, (paths["list"],), "LPIPS: weights must be a state_dict of tensors; got a list in"),
        (ValueError, (paths["text"],), "LPIPS: weights must be a state_dict of tensors; got"),
        (ValueError, (paths["pickle"],), "LPIPS: weights must be a state_dict of tensors; got"),
        (ValueError, (paths["empty"],), "LPIPS: weights must be a state_dict of tensors; got"),
        (ValueError, (paths["wide"],), "LPIPS: weights must be (64,); got (3,) for stages.0.0.bias in"),
    ):
        with pytest.raises(error) as caught:
            LPIPS.from_files(*arguments)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_images_that_do_not_fit():
    distance = LPIPS()
    for x, y in ((torch.zeros(1, 3, 16, 15),) * 2, (torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))):
        with pytest.raises(ValueError, match="LPIPS: images must be two batches"):
            distance(x, y)
    with pytest.raises(TypeError, match="LPIPS: x must be float16"):
        distance(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16))
