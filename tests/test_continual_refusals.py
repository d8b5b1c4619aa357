"""What would break the promise to earlier tasks, or cannot be done, is refused in one line."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from continual_story import FACTORIES, accomplished, story_of

from lance_edge.bundle import Bundle, write_bundle
from lance_edge.memory import LayerMemory, read_memory, write_memory
from lance_edge.statistics import read_statistics, write_statistics


@pytest.fixture(scope="module")
def story(made_once, lance_host, lance_device):
    return story_of("patch", made_once, lance_host, lance_device)


@pytest.fixture(scope="module")
def statistics(story, lance_device, tmp_path_factory):
    """Of both tasks' images, as a board collects them after the first."""
    folder = tmp_path_factory.mktemp("statistics")
    words = ("--artifact", story / "one.tar", "--checkpoint", story / "run1/last.npz", "--mode", "patch")
    lance_device("collect", *words, "--data", story / "one.npz", "--batches", 11, "-o", folder / "one.npz")
    words = (*words, "--memory", story / "memory.npz", "--task", "second")
    lance_device("collect", *words, "--data", story / "two.npz", "-o", folder / "two.npz")
    return folder


@pytest.fixture
def refused(story, lance_host, tmp_path):
    """The one line that `lance-host` ends with; nothing is written."""

    def run(*words):
        output = tmp_path / "never"
        result = lance_host(*words, "-o", output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code != 0, result.output
        assert len(lines) == 1, (result.output, result.exception)
        assert not output.exists()
        return lines[0].removeprefix("error: ")

    return run


def next_words(story, *more):
    model = f"{story.folder}/net.py:{FACTORIES[story.mode]}"
    return ("calibrate", "--model", model, "--checkpoint", story / "run1/last.npz", *more)


def protected_words(story, *more):
    return next_words(story, "--memory", story / "memory.npz", "--data", story / "two.npz", *more)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--train-bias",),
            "--train-bias: biases and norms change what earlier tasks see, whatever the memory protects; leave"
            " it out",
        ),
        (
            ("--train-norm",),
            "--train-norm: biases and norms change what earlier tasks see, whatever the memory protects; leave"
            " it out",
        ),
        (
            ("--methods", "lance,asi"),
            "--methods asi: not in patch mode, where codecs do not compress; expected some of lance, bp, or use"
            " --mode channel",
        ),
        (
            ("--methods", "hosvd", "--mode", "channel"),
            "--methods hosvd: not beside --memory; expected some of lance, bp, and --energy",
        ),
        (
            ("--memory-budget", "64KiB", "--mode", "channel"),
            "--memory-budget: not beside --memory; expected some of lance, bp, and --energy",
        ),
        (
            ("--memory-budget", "64KiB"),
            "--memory-budget: not in patch mode; choose --energy, or use --mode channel",
        ),
        (("--weights", "random"), "--weights: the next task goes on from --checkpoint; leave --weights out"),
        (("--task-name", "one"), "--task-name: one was learned already; choose another name"),
        (
            ("--task-name", "a/b"),
            "--task-name: expected letters, digits, dots and dashes, at most 64, found 'a/b'",
        ),
        (
            ("--head", "none"),
            "the network gives 10 logits, but --data has 4 classes; leave --head none away to",
        ),
        (("--energy", "0"), "--energy: expected a share above 0 and at most 1, found 0.0; the paper uses 0.7"),
    ],
)
def test_options_that_would_break_the_promise(story, refused, words, message):
    assert refused(*protected_words(story, *words)).startswith(message)


def test_options_without_the_task_before(refused, story):
    for flag, value in (("--memory", "memory.npz"), ("--stats", "two.npz"), ("--artifact", "one.tar")):
        words = ("calibrate", "--data", story / "two.npz", flag, story / value)
        assert refused(*words) == f"{flag}: goes with --checkpoint, the run of the task before; name that too"
    assert refused("calibrate") == (
        "--data: expected class folders or an .npz, found nothing; say where the images are"
    )


def test_a_memory_that_lacks_a_task_is_a_file_of_no_use(story, lance_host, tmp_path):
    """Exit codes as `--help` says."""
    others = (dataclasses.replace(story.memory.tasks[0], name="other"),)
    write_memory(tmp_path / "memory.npz", dataclasses.replace(story.memory, tasks=others))
    words = ("--memory", tmp_path / "memory.npz", "--data", story / "two.npz", "-o", tmp_path / "never")
    result = lance_host(*next_words(story, *words))
    assert result.exit_code == 3, result.output
    assert "remembers other, and the network has learned one" in result.stderr
    (tmp_path / "last.npz").write_bytes((story / "run1/last.npz").read_bytes())
    words = ("--checkpoint", tmp_path / "last.npz", "--data", story / "one.npz", "-o", tmp_path / "never")
    result = lance_host("memory", *words)
    assert (result.exit_code, "no run.json beside it" in result.stderr) == (4, True), result.output


def test_other_memories_are_refused(story, refused, tmp_path):
    memory, path = story.memory, tmp_path / "memory.npz"

    def refusal(**changes):
        write_memory(path, dataclasses.replace(memory, **changes))
        words = ("--memory", path, "--data", story / "two.npz")
        return refused(*next_words(story, *words)).removeprefix(f"{path}: ")

    (task,) = memory.tasks
    assert refusal(tasks=(dataclasses.replace(task, name="other"),)) == (
        "remembers other, and the network has learned one; extend the memory with lance-host memory after each"
        " task"
    )
    assert refusal(tasks=(dataclasses.replace(task, checkpoint_sha256="0" * 64),)) == (
        "remembers one as another checkpoint left it; give that checkpoint, or make the memory again from"
        " this one"
    )
    assert refusal(mode="channel") == (
        "is of channel mode, not patch; use --mode channel, or make the memory with --mode patch from the first"
        " task on"
    )
    fewer = {name: ranks for name, ranks in task.ranks.items() if name != "body.8"}
    less = {name: layer for name, layer in memory.layers.items() if name != "body.8"}
    assert refusal(tasks=(dataclasses.replace(task, ranks=fewer),), layers=less) == (
        "has nothing of layer body.8; make the memory again from this checkpoint"
    )


def test_a_memory_of_other_dimensions(story, refused, tmp_path):
    from device_harness import lance_device as on_board
    from device_harness import refused as refused_on_board

    other = LayerMemory(np.eye(5, 2, dtype=np.float32)[None], (2,))
    (task,) = story.memory.tasks
    tasks = (dataclasses.replace(task, ranks=task.ranks | {"hidden": (2,)}),)
    layers = story.memory.layers | {"hidden": other}
    path = tmp_path / "memory.npz"
    write_memory(path, dataclasses.replace(story.memory, tasks=tasks, layers=layers))
    expected = (
        f"{path}: hidden has 1 groups of 5 dimensions, in the package 1 of 24 (patch mode); give the memory of"
        " this network"
    )
    assert refused(*next_words(story, "--memory", path, "--data", story / "two.npz")) == expected
    words = ("--artifact", story / "one.tar", "--checkpoint", story / "run1/last.npz", "--memory", path)
    found = on_board("collect", *words, "--data", story / "two.npz", "-o", tmp_path / "stats.npz")
    assert expected in refused_on_board(found, 3)


def test_a_memory_of_another_network(story, refused, tmp_path):
    path = tmp_path / "memory.npz"
    write_memory(path, dataclasses.replace(story.memory, model="/else/where/other.py:make"))
    words = next_words(story, "--memory", path, "--data", story / "two.npz")
    message = f"{path}: of the network other.py:make, not net.py:grouped; give the memory of this one"
    assert refused(*words) == message
    words = memory_words(story, "run2", "--memory", path, "--data", story / "two.npz")
    assert refused(*words) == message


def test_layers_that_no_memory_knows(story, refused, lance_host, lance_device, tmp_path):
    """A first task that trains two layers leaves the others without a memory: they can never train."""
    model = f"{story.folder}/net.py:grouped"
    words = ("--methods", "bp", "--layers", 2, "--batch-size", 16, "--data", story / "one.npz")
    accomplished(lance_host("calibrate", "--model", model, *words, "-o", tmp_path / "small.tar"))
    words = ("--data", story / "one.npz", "--out", tmp_path / "run", "--epochs", 1, "--threads", 1)
    lance_device("train", "--artifact", tmp_path / "small.tar", *words)
    words = ("--checkpoint", tmp_path / "run/last.npz", "--data", story / "two.npz", "--layers", "all")
    assert refused("calibrate", "--model", model, *words) == (
        "--layers all: body.0 was not trained by the task before, so nothing is known of what earlier tasks"
        " need of it; choose among body.8, hidden"
    )


def test_runs_whose_package_is_not_found(story, refused, tmp_path):
    checkpoint = tmp_path / "last.npz"
    shutil.copy(story / "run1/last.npz", checkpoint)
    words = ("memory", "--checkpoint", checkpoint, "--data", story / "one.npz")
    assert refused(*words) == (
        f"{checkpoint}: no run.json beside it says which package it belongs to; name that with --artifact"
    )
    (tmp_path / "run.json").write_text(json.dumps({"artifact": {"path": "/gone/pkg.tar"}}))
    assert refused(*words) == "/gone/pkg.tar: the package of this run is not there; name it with --artifact"
    assert "belongs to another package" in refused(*words, "--artifact", story / "two.tar")


def test_packages_that_nothing_can_follow(story, refused, tmp_path):
    with Bundle(story / "one.tar") as bundle:
        manifest = bundle.manifest
        contents = {member.name: bundle.read(member.name) for member in manifest.members}
    with np.load(story / "run1/last.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"}
    headless = dataclasses.replace(manifest, head=())
    (variant,) = manifest.variants
    graphs = {role: names for role, names in variant.graphs.items() if role != "inputs"}
    untapped = dataclasses.replace(manifest, variants=(dataclasses.replace(variant, graphs=graphs),))
    for changed, message in (
        (headless, "trains no head, so no other task can follow; calibrate it again without --head none"),
        (
            untapped,
            "has no graph to the inputs of its layers; calibrate and train the first task again with this"
            " version of lance-edge",
        ),
    ):
        write_bundle(tmp_path / "pkg.tar", changed, contents)
        with Bundle(tmp_path / "pkg.tar") as bundle:
            meta = json.loads(str(arrays["meta"])) | {"artifact_sha256": bundle.sha256}
        write_checkpoint(tmp_path / "last.npz", arrays | {"meta": np.array(json.dumps(meta))})
        words = ("--checkpoint", tmp_path / "last.npz", "--artifact", tmp_path / "pkg.tar")
        found = refused("memory", *words, "--data", story / "one.npz")
        assert found == f"{tmp_path / 'pkg.tar'}: {message}"


def write_checkpoint(path, arrays):
    from lance_edge.sealed import write_sealed

    with path.open("wb") as file:
        write_sealed(file, arrays)


# --- lance-host memory --------------------------------------------------------------------------------


def memory_words(story, run, *more):
    return ("memory", "--checkpoint", story / run / "last.npz", *more)


def test_memories_that_cannot_be_made(story, refused, tmp_path):
    one, two = ("--data", story / "one.npz"), ("--data", story / "two.npz")
    assert refused(*memory_words(story, "run1")) == (
        "--data or --stats: expected one of them, the finished task's images or their statistics"
    )
    assert refused(*memory_words(story, "forgetful", *two)) == (
        "--memory: the network learned one before two; give the memory of that, or it will be forgotten"
    )
    memory = ("--memory", story / "memory.npz")
    assert refused(*memory_words(story, "run1", *one, *memory)) == (
        f"{story / 'memory.npz'}: remembers one, expected none, which the network learned before one; give that"
        " memory"
    )
    assert refused(*memory_words(story, "run2", *two, *memory, "--mode", "channel")) == (
        f"{story / 'memory.npz'}: is of patch mode, not channel; leave --mode out"
    )
    assert refused(*memory_words(story, "run1", *one, "--mode", "channel")) == (
        "body.3: a grouped convolution has no protected subspace in channel mode; use --mode patch"
    )
    assert refused(*memory_words(story, "run2", *two, "--mode", "channel")) == (
        "the memory in the package: is of patch mode, not channel; leave --mode out"
    )
    less = {name: LayerMemory(-layer.bases, layer.ranks) for name, layer in story.memory.layers.items()}
    write_memory(tmp_path / "less.npz", dataclasses.replace(story.memory, layers=less))
    assert refused(*memory_words(story, "run2", *two, "--memory", tmp_path / "less.npz")) == (
        f"{tmp_path / 'less.npz'}: is not the memory that two was trained beside, which its package holds;"
        " leave --memory out"
    )
    assert "classes" in refused(*memory_words(story, "run1", *two))
    assert refused(*memory_words(story, "run1", *one, "--threshold", 0)) == (
        "memory threshold: expected a number above 0 and at most 1, found 0; the usual one is 0.97"
    )


def test_the_memory_of_the_package_is_taken_by_default(story, lance_host, tmp_path):
    words = memory_words(story, "run2", "--data", story / "two.npz", "--threads", 1)
    accomplished(lance_host(*words, "-o", tmp_path / "a.npz"))
    accomplished(lance_host(*words, "--memory", story / "memory.npz", "-o", tmp_path / "b.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert [task.name for task in read_memory(tmp_path / "a.npz").tasks] == ["one", "two"]


def test_options_of_a_memory_are_checked_before_any_image_is_measured(story, refused, lance_host, tmp_path):
    words = memory_words(story, "run1", "--data", story / "net.py")
    assert refused(*words, "--threshold", 1.5) == (
        "memory threshold: expected a number above 0 and at most 1, found 1.5; the usual one is 0.97"
    )
    for flag, value in (("--seed", -1), ("--threads", -3), ("--batches", 0)):
        result = lance_host(*words, flag, value, "-o", tmp_path / "never")
        assert result.exit_code == 2, result.output
        assert f"Invalid value for '{flag}': {value} is not in the range x>=" in result.stderr


# --- without a single image ---------------------------------------------------------------------------


def test_statistics_make_the_same_memory_as_the_images(story, statistics, lance_host, tmp_path):
    words = memory_words(story, "run1", "--stats", statistics / "one.npz", "--threshold", 0.9)
    said = accomplished(lance_host(*words, "-o", tmp_path / "memory.npz"))
    found, expected = read_memory(tmp_path / "memory.npz"), story.memory
    for name, share in expected.tasks[0].explained.items():
        # the bases differ by what float32 moments tell apart; 1e-4 is what all paths promise
        assert found.tasks[0].explained[name] == pytest.approx(share, abs=1e-4)
        assert found.layers[name].ranks == expected.layers[name].ranks
    assert "one (threshold 0.9)" in said
    with Bundle(story / "one.tar") as bundle:
        assert (bundle.manifest.mode, found.mode) == ("channel", "patch")  # by default, whatever was compressed


def test_statistics_make_the_next_package(story, statistics, lance_host, tmp_path):
    words = ("--memory", story / "memory.npz", "--stats", statistics / "two.npz")
    said = accomplished(lance_host(*next_words(story, *words), "-o", tmp_path / "blind.tar"))
    assert "without this memory" not in said
    with Bundle(tmp_path / "blind.tar") as blind, Bundle(story / "two.tar") as seen:
        assert (blind.manifest.task, blind.manifest.classes) == ("second", seen.manifest.classes)
        assert blind.manifest.batch_size == seen.manifest.batch_size
        assert blind.manifest.mode == "patch"  # by default after an earlier task
        plans = [bundle.manifest.variant("lance").layers for bundle in (blind, seen)]
        assert [plan.layer for plan in plans[0]] == [plan.layer for plan in plans[1]]
        for found, expected in zip(*plans, strict=True):
            # the board splits its images by the package's seed, this story's second task by the same
            np.testing.assert_allclose(found.energy_kept, expected.energy_kept, atol=0.02)


def test_statistics_of_something_else(story, statistics, refused, lance_host, tmp_path):
    path = tmp_path / "stats.npz"
    own = read_statistics(statistics / "two.npz")

    def refusal(*more, **changes):
        write_statistics(path, dataclasses.replace(own, **changes))
        words = ("--memory", story / "memory.npz", "--stats", path, *more)
        return refused(*next_words(story, *words)).removeprefix(f"{path}: ")

    assert refusal(artifact_sha256="0" * 64).startswith("collected with another package (000000000000, not ")
    assert refusal(checkpoint_sha256="1" * 64).endswith("; collect the statistics with what is given here")
    assert refusal(mode="channel") == "is of channel mode, not patch; collect the statistics with --mode patch"
    fewer = {name: matrices for name, matrices in own.layers.items() if name != "hidden"}
    assert refusal(layers=fewer) == "has nothing of layer hidden; collect the statistics again"
    assert refusal("--batch-size", 8) == ("--batch-size 8: the statistics are of batches of 16; leave it out")
    assert refusal("--data", story / "two.npz") == "--stats: stands for the images of --data; give one of them"
    words = memory_words(story, "run1", "--stats", statistics / "two.npz")
    assert (
        "of the classes 0, 1, 2, 3, expected those of one: 0, 1, 2; collect them from that task's"
        in refused(*words)
    )
    write_statistics(path, dataclasses.replace(own, mode="channel"))
    assert "the memory of patch mode; collect the statistics with --mode patch" in refused(
        *memory_words(story, "run1", "--stats", path, "--mode", "patch")
    )
    write_statistics(path, dataclasses.replace(own, memory_sha256=""))
    words = next_words(story, "--memory", story / "memory.npz", "--stats", path)
    said = accomplished(lance_host(*words, "-o", tmp_path / "raw.tar"))
    assert "warning: the statistics were collected without this memory, so batch and positions are" in said


def test_statistics_of_other_shapes(story, statistics, refused, tmp_path):
    """A moment of five features where the layer has 24 would become a memory that nothing fits."""
    path, again = tmp_path / "stats.npz", "; collect the statistics again with this package"

    def refusal(file, words, **matrices):
        own = read_statistics(statistics / file)
        write_statistics(path, dataclasses.replace(own, layers=own.layers | matrices))
        return refused(*words, "--stats", path).removeprefix(f"{path}: ")

    words = memory_words(story, "run1")
    found = refusal("one.npz", words, hidden={1: np.eye(5)[None]})
    assert found == f"hidden/C1: expected [1, 24, 24], found [1, 5, 5]{again}"
    found = refusal("one.npz", words, hidden={1: np.eye(24)})
    assert found == f"hidden/C1: expected [1, 24, 24], found [24, 24]{again}"
    found = refusal("one.npz", words, hidden={0: np.eye(16)})
    assert found == f"hidden/C1: expected [1, 24, 24], found nothing{again}"
    found = refusal("one.npz", words, hidden={1: np.eye(24)[None], 7: np.eye(3)})
    assert found == f"hidden/C7: expected no such mode, found [3, 3]{again}"
    none = dataclasses.replace(read_statistics(statistics / "one.npz"), batch_size=-4)
    write_statistics(path, none)
    assert refused(*words, "--stats", path) == (
        f"{path}: of 6 batches of -4 images, expected one or more of each; collect the statistics again"
    )
    words = next_words(story, "--memory", story / "memory.npz")
    found = refusal("two.npz", words, hidden={0: np.eye(3), 1: np.eye(24)[None]})
    assert found == f"hidden/C0: expected [16, 16], found [3, 3]{again}"


# --- a network that has no room left ------------------------------------------------------------------


def test_a_full_memory_leaves_the_head_to_train(story, lance_host, lance_device, tmp_path):
    full = {
        name: LayerMemory(
            np.stack([np.eye(layer.dimension, dtype=np.float32)] * layer.groups),
            (layer.dimension,) * layer.groups,
        )
        for name, layer in story.memory.layers.items()
    }
    (task,) = story.memory.tasks
    ranks = {name: layer.ranks for name, layer in full.items()}
    memory = dataclasses.replace(story.memory, layers=full, tasks=(dataclasses.replace(task, ranks=ranks),))
    write_memory(tmp_path / "memory.npz", memory)
    words = ("--memory", tmp_path / "memory.npz", "--data", story / "two.npz")
    said = accomplished(lance_host(*next_words(story, *words), "-o", tmp_path / "head.tar"))
    assert "no layer has any null space left: the head alone trains" in said
    with Bundle(tmp_path / "head.tar") as bundle:
        assert bundle.manifest.layers == bundle.manifest.protected == ()
        assert {one.layer for one in bundle.manifest.frozen} == set(full)
    words = ("--data", story / "two.npz", "--out", tmp_path / "run", "--epochs", 1, "--threads", 1)
    lance_device("train", "--artifact", tmp_path / "head.tar", *words)
    table = accomplished(lance_host("inspect", tmp_path / "memory.npz"))
    assert "No room for another task: 5 layers of 5, which stay frozen or would." in table
    words = ("--checkpoint", tmp_path / "run/last.npz", "--data", story / "two.npz")
    words = (*words, "--memory", tmp_path / "memory.npz", "-o", tmp_path / "after.npz")
    accomplished(lance_host("memory", *words))
    assert read_memory(tmp_path / "after.npz").layers.keys() == full.keys()
