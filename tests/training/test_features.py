"""What a network says inside: the output of any module, hooks that go, and paths that are not there."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from handler.errors import SettingsError
from training.features import Features, forward

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(OrderedDict(linear=nn.Linear(4, 5), relu=nn.ReLU()))
    return nn.Sequential(OrderedDict(stem=stem, head=nn.Linear(5, 2)))


def hooks(root: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in root.modules())


class Odd(nn.Module):
    """A network with a module that answers with a pair, one that is called twice and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.LSTM(4, 4, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.twice(self.twice(self.pair(x[:, None])[0][:, 0]))
        return found


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("a fault of the network's own")


def test_the_outputs_of_named_modules() -> None:
    net = network()
    output = forward(net, X, ["stem", "stem.linear"])
    linear = net.get_submodule("stem.linear")(X)
    assert list(output.features) == ["stem.linear", "stem"]  # in the order of the calls
    assert torch.equal(output.features["stem.linear"], linear)
    assert torch.equal(output.features["stem"], linear.relu())
    assert torch.equal(output.logits, net(X))
    assert forward(net, X).features == {}


@pytest.mark.parametrize("ours", [True, False], ids=["feature", "logits"])
def test_gradients_flow_back_from_features_and_logits(ours: bool) -> None:
    net = network()
    output = forward(net, X, ["stem.linear"])
    found = output.features["stem.linear"] if ours else output.logits
    (gradient,) = torch.autograd.grad(found.sum(), net.get_parameter("stem.linear.weight"))
    assert gradient.any()
    if ours:
        torch.testing.assert_close(gradient, X.sum(0).expand(5, 4))


def test_what_follows_in_place_does_not_reach_the_features() -> None:
    """torchvision's residual networks add and rectify in place."""
    plain = network()
    expected = forward(plain, X, ["stem.linear"]).features["stem.linear"]
    assert (expected < 0).any()
    plain.get_submodule("stem").relu = nn.ReLU(inplace=True)
    assert torch.equal(forward(plain, X, ["stem.linear"]).features["stem.linear"], expected)


def test_everything_is_float32_whatever_the_network_computes_in() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = forward(network(), X, ["stem"])
    assert output.logits.dtype == output.features["stem"].dtype == torch.float32


def test_hooks_are_gone_afterwards() -> None:
    net = network()
    with Features(net, ["stem", "stem.linear"]) as found:
        assert hooks(net) == 2
        net(X)
        net(X[:2])
        assert found["stem"].shape == (2, 5)  # of the last call
    assert hooks(net) == 0
    net(X)
    assert found["stem"].shape == (2, 5)


def test_hooks_are_gone_when_the_network_raises() -> None:
    net = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), broken=Broken()))
    with pytest.raises(ArithmeticError, match="a fault of the network's own"):
        forward(net, X, ["first", "broken"])
    assert hooks(net) == 0


def test_hooks_of_others_stay() -> None:
    net, calls = network(), []
    net.get_submodule("stem").register_forward_hook(lambda *_: calls.append(1))
    forward(net, X, ["stem"])
    assert hooks(net) == 1
    assert calls == [1]


def test_a_path_that_is_not_there_names_the_nearest_and_leaves_no_hook() -> None:
    net = network()
    with pytest.raises(SettingsError, match=r"^unknown layer 'stem\.liner': did you mean 'stem\.linear'\?$"):
        forward(net, X, ["stem", "stem.liner"])
    assert hooks(net) == 0


def test_a_module_that_gives_no_tensor_is_refused() -> None:
    net = Odd()
    with pytest.raises(SettingsError, match=r"^layer pair: expected one that returns a tensor, got tuple$"):
        forward(net, X, ["pair"])
    assert hooks(net) == 0


def test_a_module_called_twice_gives_its_last_output() -> None:
    net = Odd()
    output = forward(net, X, ["twice"])
    assert torch.equal(output.features["twice"], output.logits)


def test_a_module_that_is_never_called_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^layer never: expected one that the network calls, but it never does$"):
        forward(Odd(), X, iter(["twice", "never"]))
