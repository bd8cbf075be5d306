"""The command as a user runs it."""

import json

import numpy as np
import pytest
from inceptions import random_state_dict

from sddit_jax.config.schema import ParallelConfig
from sddit_jax.evaluation import metrics
from sddit_jax.evaluation.comparison import evaluate
from sddit_jax.evaluation.feature_spaces import inception_space, measure
from sddit_jax.evaluation.image_sets import open_image_set
from sddit_jax.evaluation.reference import open_reference, write_reference
from sddit_jax.parallel import sharding

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)


def test_statistics_are_written_and_samples_compared_with_them(command, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=IMAGES, arr_1=np.arange(40))
    np.savez(tmp_path / "images.npz", arr_0=IMAGES[::-1])
    compare = ["--samples=samples.npz", "--features=pixels"]
    commands = [
        ["--source=digits", "--features=pixels", "--write_reference=digits.npz"],
        [*compare, "--reference=digits.npz", "--metrics=fid"],
        ["--source=npz:images.npz", "--features=pixels", "--write_reference=own.npz"],
        [*compare, "--reference=own.npz", "--output=own.json", "--batch_size=7"],
        [*compare, "--reference=images.npz", "--output=images.json"],
    ]
    done = [command("evaluate", *arguments, cwd=tmp_path) for arguments in commands]
    assert [each.returncode for each in done] == [0] * 5, done
    said = [each.stderr for each in done]
    assert "1797 images in digits.npz" in said[0]
    record = json.loads((tmp_path / "samples.evaluation.json").read_text())
    assert record["reference"]["record"]["source"] == "digits"
    assert f"{record['results']['fd_pixels']:.6g}" in said[1]
    assert "warning: fd_pixels, samples: 40 images give a singular covariance of 64 features" in said[1]
    for name in ("own", "images"):
        results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
        assert results["fd_pixels"] == pytest.approx(0, abs=1e-10)
        assert results["precision"] == results["recall"] == 1
        assert "kd_pixels" in results
    assert "not computed" not in said[3]


def test_what_is_wrong_is_explained(command, tmp_path):
    np.savez(tmp_path / "good.npz", arr_0=IMAGES)
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], object))
    np.savez(tmp_path / "float.npz", arr_0=IMAGES / 255)
    np.savez(tmp_path / "latents.npz", arr_0=np.zeros((5, 8, 8, 4), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=IMAGES[:1])
    np.savez(tmp_path / "small.npz", arr_0=IMAGES[:, :4, :4])
    np.savez(tmp_path / "rgb.npz", arr_0=np.repeat(IMAGES, 3, axis=3))
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "record.npz", mu=np.zeros(64), sigma=np.eye(64), record='{"features": 7}')
    for name, text in (("sidecar", "{"), ("sampler", '{"sampler": "ddim"}')):
        np.savez(tmp_path / f"{name}.npz", arr_0=IMAGES)
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "weights.pth").write_text("text")
    pixels, good = "--features=pixels", ["--samples=good.npz", "--reference=good.npz"]
    cases = [
        ([], "--samples"),
        (["--samples=good.npz", pixels], "--reference"),
        ([*good, "--source=digits", pixels], "--source"),
        (["--samples=absent.npz", "--reference=good.npz", pixels], "absent.npz does not exist"),
        (["--samples=good.npz", "--reference=absent.npz", pixels], "absent.npz is not a file"),
        (["--samples=pickled.npz", "--reference=good.npz", pixels], "pickled objects"),
        (["--samples=good.npz", "--reference=pickled.npz", pixels], "pickled objects"),
        (["--samples=float.npz", "--reference=good.npz", pixels], "arr_0 is float64"),
        (["--samples=latents.npz", "--reference=good.npz", pixels], "[5, 8, 8, 4]"),
        (["--samples=text.npz", "--reference=good.npz", pixels], "not an intact npz file"),
        (["--samples=nan.npz", "--reference=good.npz", pixels], "nan.npz: mu has 64 values that are not finite"),
        (["--samples=one.npz", "--reference=good.npz", pixels], "1 sample has no covariance"),
        (["--samples=good.npz", "--reference=one.npz", pixels], "1 images have no covariance"),
        (["--samples=folder", "--reference=good.npz", pixels], "no images"),
        (["--samples=.", "--reference=good.npz", pixels], "no images"),
        (["--samples=good.npz", "--reference=folder", pixels], "--source=folder:folder"),
        (["--samples=good.npz", "--reference=record.npz", pixels], "features of record is 7"),
        (["--samples=small.npz", "--reference=good.npz", pixels], "the samples are 4x4"),
        (["--samples=rgb.npz", "--reference=good.npz", pixels], "64 features, but the samples have 192"),
        (["--samples=sidecar.npz", "--reference=good.npz", pixels], "sidecar.json cannot be read"),
        (["--samples=sampler.npz", "--reference=good.npz", pixels], "sampler is 'ddim'"),
        (["--samples=good.npz", "--reference=statistics.npz", pixels], "features of name inception"),
        ([*good, pixels, "--metrics=fid,fvd"], "fvd"),
        ([*good, pixels, "--metrics=sfid"], "sfid cannot be computed"),
        ([*good, pixels, "--output=no/such/folder/x.json"], "no/such/folder is not a folder"),
        ([*good, pixels, "--output=good.npz/x.json"], "good.npz is not a folder"),
        ([*good, pixels, "--output=folder"], "it is a folder"),
        ([*good, "--features=clip"], "clip"),
        (good, "pt_inception"),
        ([*good, "--inception=absent.pth"], "absent.pth"),
        ([*good, "--inception=weights.pth"], "weights.pth"),
        (["--source=folder:absent", "--write_reference=x.npz", pixels], "--resolution"),
        (["--source=folder:absent", "--write_reference=x.npz", pixels, "--resolution=8"], "absent"),
        (["--source=digits", "--write_reference=x.npz", pixels, "--resolution=16"], "image_size=16"),
        (["--source=latents:absent", "--write_reference=x.npz", pixels, "--resolution=8"], "not images"),
        (["--source=npz:good.npz", "--write_reference=x.npz", pixels, "--resolution=9"], "--resolution=9"),
        (["--source=digits", "--write_reference=no/such/x.npz", pixels], "no/such is not a folder"),
    ]
    for arguments, words in cases:
        done = command("evaluate", *arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done)
        message = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert words in message, arguments


@pytest.mark.slow
def test_with_inception_from_a_file(tmp_path):
    """The whole chain with random weights: written statistics, samples, and the same by the formulas."""
    import torch

    torch.save(random_state_dict(), tmp_path / "inception.pth")
    mesh = sharding.make_mesh(ParallelConfig())
    space = inception_space(str(tmp_path / "inception.pth"), mesh, 8)
    rng = np.random.default_rng(0)
    real, fake = (rng.integers(0, high, (12, 16, 16, 3)).astype(np.uint8) for high in (256, 128))
    np.savez(tmp_path / "real.npz", arr_0=real)
    assert write_reference(tmp_path / "reference.npz", space, open_image_set(tmp_path / "real.npz"), {}, 8, 99) == 12
    with np.load(tmp_path / "reference.npz") as file:
        np.savez(tmp_path / "adm.npz", arr_0=real, **{key: file[key] for key in ("mu", "sigma", "mu_s", "sigma_s")})
    samples = measure(space, iter([fake[:8], fake[8:]]), keep=True)
    assert samples.pool_ND.shape == (12, 2048)
    assert space.record["published_weights"] is False
    adm = open_reference(tmp_path / "adm.npz", space, fake.shape, 8)
    np.testing.assert_allclose(adm.pool.covariance_DD, np.cov(adm.pool_ND.T.astype(np.float64)), rtol=1e-6)
    found = evaluate(samples, adm, space).results
    own = open_reference(tmp_path / "reference.npz", space, fake.shape, 8, ("pr", "kid"))
    for name, value in evaluate(samples, own, space).results.items():
        assert value == pytest.approx(found[name], rel=1e-5), name
    assert found["inception_score"] == metrics.inception_score(samples.logits_NK)[0]
    assert set(found) == {
        "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std",
    }  # fmt: skip
