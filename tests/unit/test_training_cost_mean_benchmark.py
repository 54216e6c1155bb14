"""Where the mean of several trainings comes to the whole DD1's mean end: curves made by hand."""

import json

import pytest

from helpers.here import run_script_here


def training(seed, whole, short, settings=("preset=digits", "dd1.training.steps=4")):
    passes = [100.0, 200.0, 300.0, 400.0]
    return {
        "preset": "digits",
        "seed": seed,
        "short": [*settings, f"seed={seed}"],
        "dd1": list(zip([600.0, 1200.0], whole, strict=True)),
        "dd1_small_batches": list(zip(passes, [9.0, 8.0, 7.0, 6.0], strict=True)),
        "dd1_then_dd2": list(zip(passes, short, strict=True)),
    }


def run(tmp_path, *trainings):
    files = [tmp_path / f"{index}.json" for index in range(len(trainings))]
    for file, found in zip(files, trainings, strict=True):
        file.write_text(json.dumps(found))
    arguments = [*map(str, files), "--output", str(tmp_path / "mean.json")]
    return run_script_here("benchmarks/training_cost_mean.py", *arguments)


def test_the_mean_is_there_from_the_point_after_which_it_never_rises_above_the_aim(tmp_path):
    # Means: whole DD1 6, 4; the short way 5, 3.5, 4.5, 3. The dip at the second point does not last.
    done = run(tmp_path, training(0, [7, 3], [6, 3, 6, 2]), training(1, [5, 5], [4, 4, 3, 4]))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "mean.json").read_text())
    assert found["aim"] == 4
    assert [point[1] for point in found["curves"]["dd1_then_dd2"]] == [5, 3.5, 4.5, 3]
    assert found["curves"]["dd1_then_dd2"][0][2] == pytest.approx(2**0.5), "the spread between the trainings"
    assert found["passes"] == {"dd1": 1200, "dd1_small_batches": None, "dd1_then_dd2": 400}
    assert found["share"] == {"dd1_small_batches": None, "dd1_then_dd2": pytest.approx(1 / 3)}
    assert (tmp_path / "mean.svg").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (training(0, [5, 5], [4, 4, 3, 4]), "seeds"),
        (training(1, [5, 5], [4, 4, 3, 4], settings=("preset=digits_var",)), "same settings"),
        (training(1, [5, 5], [4, 4, 3, 4]) | {"dd1": [[600.0, 5.0]]}, "different points"),
    ],
)
def test_trainings_that_do_not_belong_together_have_no_mean(tmp_path, other, message):
    done = run(tmp_path, training(0, [7, 3], [6, 3, 6, 2]), other)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "mean.json").exists()
