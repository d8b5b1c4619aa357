"""What `--model` may name: the zoo, the user's own code, torchvision and timm."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lance_edge.errors import ModelError, PlatformError
from lance_edge.input_spec import Preprocessing
from lance_host.network import NetworkRequest, load_network, open_network
from lance_host.sources import open_source
from lance_host.zoo import ZOO

CODE = """
import torch
from torch import nn
from neighbour import WIDTH

def plain():
    features = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(WIDTH, 10))

def with_classes(num_classes, width=WIDTH):
    net = plain()
    net[4] = nn.Linear(width, num_classes)
    return net

class Net(nn.Sequential):
    def __init__(self, num_classes=7):
        super().__init__(*with_classes(num_classes))

net = plain()
settings = {}

def raises(): raise ValueError("first line\\nno weights here")
def needs(width, depth, num_classes): return plain()
def gives_nothing(): return None
def double(): return plain().double()
def two_outputs():
    class Two(nn.Module):
        def forward(self, x): return x, x
    return Two()
"""


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch):
    """What a test imports is forgotten behind it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("own", "neighbour", "broken", "torchvision", "timm") or name.startswith(
            "lance_model_"
        ):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 6\n")
    (tmp_path / "own.py").write_text(CODE)
    return tmp_path / "own.py"


def refusal(model, kind=ModelError):
    with pytest.raises(kind) as caught:
        open_source(str(model))
    return str(caught.value)


def loaded(model, classes=4, **request):
    said = []
    network = load_network(
        NetworkRequest(str(model), **{"layers": "1", **request}), classes, said.append, lambda done, size: None
    )
    return network, said


# --- the zoo, and nothing ---


def test_a_name_of_the_zoo():
    assert open_source("resnet18") is ZOO["resnet18"]


@pytest.mark.parametrize("name", ["resnet", "", "mcunet.pth", "Resnet18"])
def test_an_unknown_name_lists_what_there_is(name):
    message = refusal(name)
    assert message.startswith(f"--model {name}: no such network; lance-host knows mcunet, mcunet-320kb, ")
    assert "FILE.py:FACTORY, PACKAGE.MODULE:FACTORY, torchvision:NAME, timm:NAME" in message


# --- factories ---


@pytest.mark.parametrize("factory", ["plain", "with_classes", "Net", "net"])
def test_a_file_gives_a_network_with_a_new_head(file, factory):
    network, said = loaded(f"{file}:{factory}")
    assert network.module(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert (network.head, network.selections) == ("4", (("0",),))
    assert network.name == f"own.py:{factory}", "folders of this machine are nobody's business"
    assert network.weights_source == f"as built by own.py:{factory}"
    assert f"weights: {network.weights_source}" in said
    assert any(line.startswith("input: 3 x 224 x 224, mean 0.485") for line in said)


def test_a_module_gives_the_same_by_its_name(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    network, _ = loaded("own:with_classes")
    assert (network.name, network.head) == ("own:with_classes", "4")


def test_weights_of_the_factory_are_kept_but_the_head(file):
    network, _ = loaded(f"{file}:net")
    original = sys.modules["lance_model_own"].net
    assert torch.equal(network.module[0].weight, original[0].weight)
    assert original[4].out_features == 10, "the user's own object stays as it was"


def test_random_weights_of_a_factory_follow_from_the_seed(file):
    weights = [loaded(f"{file}:plain", seed=seed)[0].module[0].weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_network_is_float32_and_nothing_in_it_works_in_place(file):
    network, _ = loaded(f"{file}:double")
    assert {tensor.dtype for tensor in network.module.state_dict().values()} == {torch.float32}
    assert not any(getattr(module, "inplace", False) for module in network.module.modules())


def test_weights_of_a_file_go_into_the_users_network(file, tmp_path):
    donor, _ = loaded(f"{file}:plain", seed=5)
    torch.save(donor.module.state_dict(), tmp_path / "own.pth")
    network, _ = loaded(f"{file}:plain", weights=str(tmp_path / "own.pth"))
    assert torch.equal(network.module[0].weight, donor.module[0].weight)


def test_the_classifier_stays_where_no_head_is_asked_for(file):
    network, _ = loaded(f"{file}:net", classes=10, head="none")
    assert network.head is None
    assert torch.equal(network.module[4].weight, sys.modules["lance_model_own"].net[4].weight)
    with pytest.raises(ModelError, match="gives 10 logits, but --data has 4 classes"):
        loaded(f"{file}:net", classes=4, head="none")
    with pytest.raises(ModelError, match="--layers 0 --head none: nothing is left to train"):
        loaded(f"{file}:net", classes=10, head="none", layers="0")


def test_without_data_the_network_is_as_it_is(file):
    said = []
    opened = open_network(NetworkRequest(f"{file}:plain"), None, said.append)
    assert opened.module[4].out_features == 10
    assert opened.head == "4"


BROKEN = {
    "no file": ("absent.py:make", r"absent.py:make: .*absent.py is no file; give the path of a Python file"),
    "no attribute": ("own.py:plane", r"own.py:plane: own has no 'plane'; it has plain"),
    "empty attribute": ("own.py:", r"own.py:: own has no ''; it has "),
    "no factory": ("own.py:settings", "expected a function or class that gives an nn.Module, .* found dict"),
    "arguments": ("own.py:needs", "needs the arguments width, depth; give a function without arguments, or"),
    "broken file": (
        "broken.py:make",
        r"importing .*broken.py raised ZeroDivisionError: division by zero; correct",
    ),
    "lacking import": ("broken2.py:make", "raised ModuleNotFoundError: No module named 'not_here'; correct"),
    "syntax": ("broken3.py:make", "importing .*broken3.py raised SyntaxError: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_give_no_factory(case, file):
    model, message = BROKEN[case]
    (file.parent / "broken.py").write_text("1 / 0")
    (file.parent / "broken2.py").write_text("import not_here")
    (file.parent / "broken3.py").write_text("def make(:")
    with pytest.raises(ModelError, match=message):
        open_source(str(file.parent / model))


def test_modules_that_give_no_factory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert (
        "no module nowhere here; install it, run lance-host in the folder that holds it, or give the file:"
        in (refusal("nowhere.net:make"))
    )
    assert "path/to/net.py:FACTORY" in refusal("nowhere.net:make")
    (file.parent / "broken.py").write_text("import not_here")
    assert "importing broken raised ModuleNotFoundError: No module named 'not_here'; install it" in (
        refusal("broken:make")
    )
    (file.parent / "broken.py").write_text("1 / 0")
    assert "importing broken raised ZeroDivisionError: division by zero; correct it" in refusal("broken:make")


def test_factories_that_fail(file):
    with pytest.raises(
        ModelError, match=r"own.py:raises: building it raised ValueError: no weights here; correct it"
    ):
        loaded(f"{file}:raises")
    with pytest.raises(
        ModelError, match=r"expected it to give an nn.Module, found NoneType; return the network"
    ):
        loaded(f"{file}:gives_nothing")
    with pytest.raises(ModelError, match=r"expected one tensor \[N, classes\], found tuple"):
        loaded(f"{file}:two_outputs")


# --- libraries: stand-ins with the interface of torchvision 0.28 and timm 1.0 ---

TORCHVISION = """
import enum
import torch
from torch import nn

class Transforms:
    crop_size, resize_size = [48], [56]
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    class interpolation:
        value = "bicubic"

def net(classes=1000):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

class Weights(enum.Enum):
    DEFAULT = 1
    def transforms(self): return Transforms()
    def get_state_dict(self, check_hash=False):
        assert check_hash
        if OFFLINE: raise OSError("no route to host")
        return {name: value + 1 for name, value in net().state_dict().items()}

OFFLINE = False
NAMES = ["small_net", "smaller_net"]
def list_models(module=None): return NAMES
def get_model_weights(name): return Weights
def get_model(name, weights="DEFAULT", **arguments):
    assert weights is None
    network = net()
    network.arguments = arguments
    return network
"""

TIMM = """
from types import SimpleNamespace
import torch
from torch import nn

def is_model(name): return name == "small_net"
def list_models(pattern="*"): return ["small_net"] if "small" in pattern or pattern == "*" else []
def create_model(name, pretrained=False, num_classes=1000):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    if pretrained:
        net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    return net

class models:
    @staticmethod
    def get_pretrained_cfg(name):
        return SimpleNamespace(input_size=(3, 48, 48), crop_pct=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
                               interpolation="random", classifier="3")
"""


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Packages called torchvision and timm, and nothing of these names from elsewhere."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "models.py").write_text(TORCHVISION)
    (tmp_path / "timm.py").write_text(TIMM)
    sys.path.insert(0, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "preprocessing"),
    [
        ("torchvision:small_net", Preprocessing(48, 56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")),
        ("timm:small_net", Preprocessing(48, 53, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")),
    ],
)
def test_a_library_brings_network_weights_and_preprocessing(libraries, model, preprocessing):
    network, said = loaded(model)
    assert network.preprocessing == preprocessing
    assert (network.name, network.head, network.weights_source) == (model, "3", f"default of {model}")
    *notes, weights = said
    assert weights == f"weights: default of {model}"
    stands_in = "resizes images by random, which is not known here: bilinear stands in; choose another with"
    assert [stands_in in note for note in notes] == [True] * model.startswith("timm")
    torch.manual_seed(1)
    start = nn.Conv2d(3, 4, 3)
    assert torch.equal(network.module[0].weight, start.weight + 1)
    assert network.module[3].out_features == 4
    assert loaded(model, weights="random")[0].weights_source == "random, seed 0"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("small_net", {}),
        ("googlenet", {"transform_input": True}),
        ("inception_v3", {"transform_input": True}),
        ("vit_h_14", {"image_size": 48}),
    ],
)
def test_a_network_of_torchvision_is_built_as_for_its_weights(libraries, name, arguments):
    """Its builders set these where they are given weights, which we load ourselves."""
    importlib.import_module("torchvision.models").NAMES.append(name)
    network, _ = loaded(f"torchvision:{name}")
    assert network.module.arguments == arguments


@pytest.mark.parametrize(
    ("library", "names"), [("torchvision", "small_net, smaller_net"), ("timm", "small_net")]
)
def test_a_network_that_the_library_does_not_have(libraries, library, names):
    assert refusal(f"{library}:smal_net") == (
        f"--model {library}:smal_net: {library} has no such network; it has {names}"
    )


def test_weights_of_a_library_that_cannot_be_had(libraries):
    models = libraries / "torchvision" / "models.py"
    models.write_text(models.read_text().replace("OFFLINE = False", "OFFLINE = True"))
    with pytest.raises(ModelError) as caught:
        loaded("torchvision:small_net")
    assert str(caught.value) == (
        "--model torchvision:small_net: its weights cannot be had (OSError: no route to host); give a file as"
        " --weights FILE, or start from --weights random"
    )


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_that_is_not_installed(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # an import of it raises ModuleNotFoundError
    assert refusal(f"{library}:net", PlatformError) == (
        f"--model {library}:net: {library} is not installed; install it with: pip install {library}"
    )


def test_a_library_that_does_not_fit_this_torch(libraries):
    (libraries / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    message = refusal("timm:net", PlatformError)
    assert message.startswith(
        f"--model timm:net: timm does not load beside torch {torch.__version__} (RuntimeError: "
    )
    assert message.endswith("install versions that belong together: pip install --upgrade torch timm")


def test_a_library_that_lacks_another(libraries):
    (libraries / "timm.py").write_text("import huggingface_hub_of_nowhere")
    assert "huggingface_hub_of_nowhere is not installed; install it with: pip install timm" in (
        refusal("timm:net", PlatformError)
    )


def test_this_test_leaves_no_imports(file):
    open_source(f"{file}:plain")
    assert Path(sys.modules["neighbour"].__file__).parent == file.parent
