"""Every configuration in which PyTorch tests its own SGD, RMSprop, Adam, AdamW and Muon, here with ours: weights and state
after five steps are the same, or, where ours lack an option, it is refused by name wherever it can be given."""
import inspect, pickle, subprocess, sys
import pytest
import torch
from torch import nn
from exp.nb_00 import set_seed
from exp.nb_12 import SGD, Adam, AdamW, Muon, RMSProp

TWINS = {'SGD': SGD, 'RMSprop': RMSProp, 'Adam': Adam, 'AdamW': AdamW, 'Muon': Muon}
twins = pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.skipif(
    not hasattr(torch.optim, name), reason=f'PyTorch {torch.__version__} has no {name}')) for name in TWINS])

# In a process of its own: PyTorch's test helpers change global settings, and want a package that we do without.
LIST = '''
import pickle, sys, types, unittest
sys.modules.setdefault('expecttest', types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal.common_optimizers import optim_db
found = [(info.optim_cls.__name__, given.kwargs) for info in optim_db if info.optim_cls.__name__ in sys.argv[1:]
         for device in ('cpu', 'cuda') for given in info.optim_inputs_func(device)]
sys.stdout.buffer.write(pickle.dumps(found))
'''

@pytest.fixture(scope='module')
def configs():
    "Class name -> list of options."
    out = subprocess.run([sys.executable, '-c', LIST, *TWINS], capture_output=True, timeout=120)
    if out.returncode: pytest.skip(f'no list of configurations: {out.stderr.decode()[-200:]}')
    found = pickle.loads(out.stdout)
    return {name: [kwargs for n, kwargs in found if n == name] for name in TWINS}


def known(cls): return set(inspect.signature(cls).parameters)

def supported(name, kwargs): return kwargs.keys() <= known(TWINS[name])

def weights(name, dtype, memory):
    set_seed(0)
    shapes = [(4, 3), (3, 5)] if name == 'Muon' else [(4, 3), (4,), (), (5, 3, 2, 2), (2, 0)]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    if memory is torch.channels_last: params = [nn.Parameter(p.detach().to(memory_format=memory)) if p.ndim == 4 else p for p in params]
    return params

def five_steps(cls, params, **options):
    opt = cls(params, **options)
    set_seed(1)
    for _ in range(5):
        for p in params: p.grad = torch.zeros_like(p).copy_(torch.randn(p.shape))
        opt.step()
        opt.zero_grad()
    return opt

def ours(name, params, kwargs):
    if name != 'Muon': return five_steps(TWINS[name], params, **kwargs)
    return five_steps(lambda params, **options: Muon([dict(params=params)], ns_dtype=torch.bfloat16, **options), params, **kwargs)

# float64 differs in the order of rounding alone, float32 likewise; in bfloat16 the kernels round once a step, where PyTorch's
# default rounds after each of its operations, and each rounding may be off by 1 in 256
TOLERANCE = {torch.float64: dict(rtol=1e-12, atol=1e-13), torch.float32: dict(rtol=1e-5, atol=1e-6), torch.bfloat16: dict(rtol=0.04, atol=0.02)}

@pytest.mark.parametrize('dtype, memory', [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.channels_last)],
                         ids=['float64', 'float32', 'bfloat16', 'channels_last'])
@twins
def test_weights_and_state_are_the_twins(name, dtype, memory, configs):
    tried = [kwargs for kwargs in configs[name] if supported(name, kwargs)]
    assert len(tried) >= 3
    for kwargs in tried:
        a, b = weights(name, dtype, memory), weights(name, dtype, memory)
        mine, theirs = ours(name, a, kwargs), five_steps(getattr(torch.optim, name), b, **kwargs)
        tolerance = dict(TOLERANCE[dtype])
        if isinstance(kwargs.get('lr'), torch.Tensor): tolerance['rtol'] = max(tolerance['rtol'], 1e-6)  # a rate in float32
        for p, q in zip(a, b):
            torch.testing.assert_close(p, q, msg=lambda m: f'{kwargs}: {m}', **tolerance)
            assert p.stride() == q.stride()
            assert {k for k, v in theirs.state[q].items() if v is not None} == mine.state.get(p, {}).keys(), kwargs
            for k, v in mine.state.get(p, {}).items():
                torch.testing.assert_close(v, theirs.state[q][k], msg=lambda m: f'{kwargs}, {k}: {m}', **tolerance)
                assert v.dtype is theirs.state[q][k].dtype and v.stride() == theirs.state[q][k].stride(), (kwargs, k)


@pytest.mark.parametrize('name, options', [('SGD', dict(momentum=0.9, nesterov=True, weight_decay=0.1)), ('Adam', dict(weight_decay=0.1)), ('AdamW', {})])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_the_kernel_is_the_twins_to_the_last_bit(name, options, dtype):
    if name == 'SGD' and dtype is torch.bfloat16: pytest.skip('that kernel is wrong on CPUs, and not used')
    a, b = weights(name, dtype, None), weights(name, dtype, None)
    mine, theirs = ours(name, a, options), five_steps(getattr(torch.optim, name), b, fused=True, **options)
    for p, q in zip(a, b):
        assert torch.equal(p, q)
        assert all(torch.equal(v, theirs.state[q][k]) for k, v in mine.state[p].items())


@twins
def test_options_that_ours_lack_are_refused_wherever_they_are_given(name, configs):
    refused = [kwargs for kwargs in configs[name] if not supported(name, kwargs)]
    assert refused
    for kwargs in refused:
        params, first = weights(name, torch.float32, None), next(k for k in kwargs if k not in known(TWINS[name]))
        with pytest.raises(TypeError, match=first): TWINS[name](params, **kwargs)
        lacking = {k: v for k, v in kwargs.items() if k not in known(TWINS[name])}
        harmless = getattr(torch.optim, name)(weights(name, torch.float32, None)).defaults
        changed = {k: v for k, v in lacking.items() if v != harmless[k] and (v or harmless[k])}
        if not changed: continue  # foreach=False: as it is
        said = '|'.join(f'expected {k}=' for k in changed)
        with pytest.raises(ValueError, match=said): TWINS[name]([dict(params=params, **changed)])
        opt = TWINS[name]([dict(params=params[:1])])
        with pytest.raises(ValueError, match=said): opt.add_param_group(dict(params=params[1:], **changed))
        assert len(opt.param_groups) == 1
        opt.param_groups[0].update(changed)
        before = [p.detach().clone() for p in params]
        params[0].grad = torch.ones_like(params[0])
        for _ in range(2):
            with pytest.raises(ValueError, match=said): opt.step()
        assert all(map(torch.equal, before, params))
        opt = TWINS[name]([dict(params=params)])
        try: theirs = getattr(torch.optim, name)(params, **{k: v for k, v in kwargs.items()})
        except (RuntimeError, ValueError): continue  # theirs refuses it on the CPU
        if changed.keys() <= {'foreach', 'fused'}: opt.load_state_dict(theirs.state_dict())  # how, not what
        else:
            with pytest.raises(ValueError, match=said): opt.load_state_dict(theirs.state_dict())
