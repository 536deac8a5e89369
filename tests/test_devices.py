"Devices: one is taken only if it computes what the CPU computes."
import pytest
import torch
from torch.nn import functional as F

from llava_med.core import devices
from llava_med.core.devices import device_fault, pick_device, probe_step

REAL = probe_step


class Mac:
    "A machine whose PyTorch knows an Apple GPU; what that computes is computed here, and may be wrong."
    def __init__(self, monkeypatch):
        self.patch, self.calls = monkeypatch, 0
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
        monkeypatch.setattr(devices, 'probe_step', self.step)
        device_fault.cache_clear()
        self.exact()

    def exact(self): self.spoil = lambda: REAL('cpu')

    def step(self, device):
        if device == 'cpu': return REAL('cpu')
        self.calls += 1
        return self.spoil()

    def wrong(self, **functions):
        "The device's own versions of PyTorch's functions, by name in torch.nn.functional."
        def step():
            with pytest.MonkeyPatch.context() as m:
                for name, f in functions.items(): m.setattr(F, name, f)
                return REAL('cpu')
        self.spoil = step


@pytest.fixture
def mac(monkeypatch):
    yield Mac(monkeypatch)
    device_fault.cache_clear()


sdpa, cross, gelu = F.scaled_dot_product_attention, F.cross_entropy, F.gelu
WRONG = {
    'a causal mask without the padding': dict(scaled_dot_product_attention=lambda q, k, v, attn_mask:
                                              sdpa(q, k, v, is_causal=True)),
    'no mask at all': dict(scaled_dot_product_attention=lambda q, k, v, attn_mask: sdpa(q, k, v)),
    'a loss over all tokens': dict(cross_entropy=lambda x, y, ignore_index: cross(x, y)),
    'another gelu': dict(gelu=lambda x: gelu(x, approximate='tanh')),
    'half precision': dict(gelu=lambda x: gelu(x.bfloat16()).float()),
    'a gradient that is lost': dict(gelu=lambda x: gelu(x.detach()) + x - x.detach()),
    'values that are NaN': dict(gelu=lambda x: gelu(x)*float('nan'))}


def test_an_exact_device_is_taken_without_a_word(mac, capsys):
    assert str(pick_device('auto')) == 'mps' and str(pick_device('mps')) == 'mps'
    assert capsys.readouterr().out == '' and mac.calls == 1, 'it is probed once'


@pytest.mark.parametrize('fault', WRONG)
def test_a_device_that_computes_something_else_is_left_with_one_line(fault, mac, capsys):
    mac.wrong(**WRONG[fault])
    assert str(pick_device('auto')) == 'cpu'
    out = capsys.readouterr().out
    assert out.startswith('The CPU is used in place of mps: a test step is off') and out.count('\n') == 1


def test_an_operation_that_is_missing_costs_one_line(mac, capsys):
    def missing(*_): raise NotImplementedError('not implemented for MPS')
    mac.wrong(conv2d=lambda *a, **k: missing())
    assert str(pick_device('mps')) == 'cpu'
    assert 'NotImplementedError' in (out := capsys.readouterr().out) and out.count('\n') == 1


def test_the_probe_itself_meets_a_device_that_is_not_there(mac):
    "Here PyTorch is built without mps: the real probe stops, and the CPU is taken."
    if torch.backends.mps.is_built(): pytest.skip('this PyTorch knows mps')
    mac.spoil = lambda: REAL('mps')
    assert str(pick_device('auto')) == 'cpu'


def test_the_probe_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    a = torch.rand(3)
    torch.manual_seed(3)
    probe_step('cpu')
    assert torch.equal(a, torch.rand(3))


def test_other_devices_are_not_probed(mac):
    pick_device('cpu')
    mac.patch.setattr(torch.cuda, 'is_available', lambda: True)
    assert str(pick_device('auto')) == 'cuda' and not mac.calls
