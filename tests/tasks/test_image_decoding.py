"""One image from its file to normalised pixels: decoding, augmentation, and images that cannot be decoded."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms as T
from images import SMALL, encode, imagenet_rows, pixels

from hf_guidance.tasks.image_decoding import ImageCollator, ImageDecoder, PixelFormat


def decoder(**options):
    defaults = {"sizes": [16], "columns": ("image", "label"), "classes": 1000}
    return ImageDecoder(**(defaults | options))


def test_augmentation_is_torchvisions_and_a_function_of_seed_epoch_and_content():
    rows = imagenet_rows(6, odd=False)
    train = decoder(augmentation="crop_flip", seed=3)
    before = torch.get_rng_state()
    views = [train(rows[0], epoch)["pixel_values"][0] for epoch in range(40)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({view.numpy().tobytes() for view in views}) > 35
    assert torch.equal(train(rows[0], 7)["pixel_values"][0], views[7])
    assert not torch.equal(decoder(augmentation="crop_flip", seed=4)(rows[0], 7)["pixel_values"][0], views[7])
    image = PIL.Image.open(io.BytesIO(rows[0]["image"]["bytes"]))
    reference = T.Compose([T.RandomResizedCrop(16), T.RandomHorizontalFlip(), T.PILToTensor()])
    torch.manual_seed(0)
    means = torch.tensor([reference(image).float().mean() for _ in range(300)])
    ours = torch.tensor([train(rows[0], epoch)["pixel_values"][0].float().mean() for epoch in range(300)])
    assert ours.mean() == pytest.approx(float(means.mean()), abs=3 * float(means.std()) / 300**0.5 * 2**0.5)
    assert ours.std() == pytest.approx(float(means.std()), rel=0.2)


def test_an_object_has_a_place_of_its_own_on_its_canvas_and_another_in_each_epoch_if_it_is_shifted():
    def grey(value):
        return {"image": {"bytes": encode(np.full((4, 4, 3), value, np.uint8)), "path": None}, "label": 1}

    white = grey(255)

    def place(row, epoch=0, **options):
        view = decoder(sizes=[10], object_size=4, **options)(row, epoch)["pixel_values"][0]
        assert view.shape == (3, 10, 10)
        inside = view[0].nonzero()
        assert len(inside) == 16
        assert (inside.amax(0) - inside.amin(0)).tolist() == [3, 3]
        return tuple(inside.amin(0).tolist())

    assert place(white) == place(white, 5) == place(white, seed=3)
    assert len({place(white, epoch, augmentation="shift") for epoch in range(60)}) > 25
    assert len({place(grey(value)) for value in range(200, 256)}) > 20
    small, large = decoder(sizes=[10, 20], object_size=4)(white)["pixel_values"]
    assert large.shape == (3, 20, 20)
    assert small.float().mean() == pytest.approx(float(large.float().mean()), rel=0.1)


def test_half_of_the_images_are_flipped():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 12:] = 255
    flips = 0
    for number in range(200):
        image[0, 0] = number  # other content, another draw
        row = {"image": {"bytes": encode(image, kind="PNG"), "path": None}, "label": 0}
        view = decoder(augmentation="crop_flip")(row)["pixel_values"][0].float()
        flips += view[..., :8].mean() > view[..., 8:].mean()
    assert 70 < flips < 130


def test_both_sizes_show_the_same_crop():
    train = decoder(sizes=[16, 32], augmentation="crop_flip")
    for row in imagenet_rows(5, odd=False):
        small, large = (view.float() for view in train(row, 1)["pixel_values"])
        assert (large.shape, small.shape) == ((3, 32, 32), (3, 16, 16))
        halved = torch.nn.functional.avg_pool2d(large[None], 2)[0]
        assert torch.corrcoef(torch.stack([halved.flatten(), small.flatten()]))[0, 1] > 0.9


def test_grey_cmyk_and_turned_images_become_upright_rgb():
    array = pixels(1, (24, 24))
    upright = decoder(sizes=[24])
    for mode in ("L", "CMYK", "RGB"):
        row = {"image": {"bytes": encode(array, mode), "path": "a"}, "label": 1}
        assert upright(row)["pixel_values"][0].shape == (3, 24, 24)
    image, turned = PIL.Image.fromarray(array), io.BytesIO()
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 3  # upside down
    image.rotate(180).save(turned, "PNG", exif=exif)
    view = upright({"image": {"bytes": turned.getvalue(), "path": "a"}, "label": 1})["pixel_values"][0]
    assert torch.equal(view, torch.from_numpy(array).permute(2, 0, 1))


def test_sixteen_bits_are_scaled_and_floating_point_and_missing_images_are_bad():
    ramp = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    buffer = io.BytesIO()
    PIL.Image.fromarray(ramp).save(buffer, "PNG")
    view = decoder(sizes=[24])({"image": {"bytes": buffer.getvalue(), "path": "a"}, "label": 1})["pixel_values"][0]
    assert np.abs(view[0].numpy().astype(int) - ramp / 257).max() <= 1
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ones((4, 4), np.float32)).save(buffer, "TIFF")
    for encoded, words in (
        ({"bytes": buffer.getvalue(), "path": "a.tiff"}, r"a\.tiff cannot be decoded: its pixels are floating-point"),
        ({"bytes": None, "path": None}, "the row holds no image"),
        (None, "the row holds no image"),
    ):
        with pytest.raises(ValueError, match=words):
            decoder()({"image": encoded, "label": 0})
        assert decoder(on_bad_image="skip")({"image": encoded, "label": 0}) is None


def test_one_decode_serves_two_normalisations():
    target, guide = SMALL, PixelFormat(16, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    row = decoder()(imagenet_rows(1)[0])
    assert len(row["pixel_values"]) == 1
    batch = ImageCollator(target, guide)([row, row])
    whole = row["pixel_values"][0].float() / 255
    for name, form in (("pixel_values", target), ("guide_pixel_values", guide)):
        expected = (whole - torch.tensor(form.mean)[:, None, None]) / torch.tensor(form.std)[:, None, None]
        torch.testing.assert_close(batch[name][1], expected, atol=1e-5, rtol=1e-5)
    assert set(ImageCollator(target, SMALL)([row])) == {"pixel_values", "labels"}


def test_a_batch_of_bad_images_alone_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 images of a batch could be decoded"):
        ImageCollator(SMALL)([None, None, None])
