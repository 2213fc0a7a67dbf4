"""The training rows: by hand, exp, and the peers.

Each function gets ready, untimed, and returns what is timed: `run()` trains an epoch on `job`, leaves the trained weights in
`job.model`, and returns the validation accuracy, or None without validation rows. Libraries are imported inside: each has a process
of its own. Lean is the fastest that a library's documentation offers for data in memory, its callbacks, logs and bars off;
defaults is what its first tutorial gives, with 0 worker processes, which would only slow down data in memory.
"""
import logging
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from work import CNNS, SEED, TRAINING, row


@row('by hand', 'lean', 'again', works=TRAINING)
def by_hand(job, variant):
    "The loop one writes: a permutation an epoch, tensors indexed by a batch of it. The same again: how far it differs is noise."
    opt = job.optimizer()
    def run():
        job.model.train()
        for xb, yb in job.batches():
            F.cross_entropy(job.model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
        return job.accuracy()
    return run


@row('by hand', 'defaults')
def tutorial(job, variant):
    "PyTorch's tutorial: TensorDataset and DataLoader, the loss printed every 100 batches, loss and accuracy at the end."
    opt, loss_func, (train_dl, valid_dl) = job.optimizer(), nn.CrossEntropyLoss(), job.torch_dls()
    def run():
        job.model.train()
        for i, (xb, yb) in enumerate(train_dl):
            loss = loss_func(job.model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if i % 100 == 0: print(f'loss: {loss.item():>7f}  [{(i + 1)*len(xb):>5d}/{len(job.x):>5d}]')
        if not job.has_valid: return None
        job.model.eval()
        total, right = 0, 0
        with torch.no_grad():
            for xb, yb in valid_dl:
                pred = job.model(xb)
                total += loss_func(pred, yb).item()
                right += (pred.argmax(1) == yb).type(torch.float).sum().item()
        print(f'accuracy: {right/len(job.x_valid):>0.1%}, loss: {total/len(valid_dl):>8f}')
        return right/len(job.x_valid)
    return run


@row('matrix products alone', '', works=('mlp',), worker='by hand')
def floor(job, variant):
    "The floor: the matrix products of the same epoch, forward and backward and over the validation rows, into buffers made before."
    w1, w2 = (p.detach() for p in job.model.parameters() if p.ndim == 2)
    def buffers(bs): return torch.empty(bs, len(w1)), torch.empty(bs, len(w2))
    h, out = buffers(job.bs)
    grad_w1, grad_w2, grad_h = map(torch.empty_like, (w1, w2, h))
    def forward(xb, h, out):
        torch.mm(xb, w1.T, out=h)
        torch.mm(h, w2.T, out=out)
    def run():
        for xb in job.x.split(job.bs)[:len(job.batches())]:
            forward(xb, h, out)
            torch.mm(out.T, h, out=grad_w2)
            torch.mm(out, w2, out=grad_h)
            torch.mm(grad_h.T, xb, out=grad_w1)
        whole = buffers(2*job.bs)
        for xb, _ in job.slices(): forward(xb, *(b[:len(xb)] for b in whole))
    return run


@row('exp, our SGD', 'lean', 'defaults', works=TRAINING, worker='exp')
@row('exp, our SGD', 'channels_last', works=CNNS, worker='exp')
def exp_our_sgd(job, variant):
    """Defaults: every default callback, accuracy as a metric, our SGD. Lean: no table, and only the callback that measures.
    channels_last: the same, with the channels of a pixel side by side in memory."""
    from exp.nb_12 import SGD
    return learner(job, variant, SGD)

@row('exp, torch SGD', 'lean', 'defaults', worker='exp')
def exp_torch_sgd(job, variant):
    "The same with torch.optim.SGD."
    return learner(job, variant, torch.optim.SGD)

@row('exp, Record', 'lean', 'defaults', works=TRAINING, worker='exp')
@row('exp, Record', 'channels_last', works=CNNS, worker='exp')
def exp_record(job, variant):
    "Our SGD, and the callback `Record`: the step recorded once, which is not timed, and replayed."
    from exp.nb_12 import SGD
    from exp.nb_30 import Record
    return learner(job, variant, SGD, Record(), ready=True)

@row('exp, Compile', 'lean', 'defaults', works=TRAINING, worker='exp')
@row('exp, Compile', 'channels_last', works=CNNS, worker='exp')
def exp_compile(job, variant):
    "Our SGD, and the callback `Compile`: what was recorded, compiled. Compiling is not timed."
    from exp.nb_12 import SGD
    from exp.nb_30 import Compile
    return learner(job, variant, SGD, Compile(), ready=True)

@row('exp, Compile(step=True)', 'lean', 'defaults', works=TRAINING, worker='exp')
@row('exp, Compile(step=True)', 'channels_last', works=CNNS, worker='exp')
def exp_compile_step(job, variant):
    "The same with the optimizer's step compiled, too."
    from exp.nb_12 import SGD
    from exp.nb_30 import Compile
    return learner(job, variant, SGD, Compile(step=True), ready=True)

def learner(job, variant, opt_func, *cbs, ready=False):
    from exp.nb_03 import accuracy
    from exp.nb_04 import DataLoader, Dataset
    from exp.nb_10 import Learner, Metrics
    class Lean(Learner): default_cbs = (Metrics,)
    lean = variant != 'defaults'
    if variant == 'channels_last': job.model.to(memory_format=torch.channels_last)
    train_dl = DataLoader(Dataset(job.x, job.y), job.bs, shuffle=True, drop_last=True, seed=SEED)
    valid_dl = DataLoader(Dataset(job.x_valid, job.y_valid), 2*job.bs) if job.has_valid else None
    options = dict(opt_func=opt_func, lr=job.lr, metrics=accuracy, progress=not lean, cbs=cbs)
    learn = (Lean if lean else Learner)(job.model, (train_dl, valid_dl), **options)
    if ready: _compile_now(learn)
    def run():
        learn.fit(1)
        return learn.results.get('accuracy')
    return run


def _compile_now(learn):
    "Train on two batches, so that all is compiled, and put the weights back."
    first = {k: v.clone() for k, v in learn.model.state_dict().items()}
    state = learn.dls[0].sampler.generator.get_state()
    learn.fit(1, max_batches=2)
    learn.model.load_state_dict(first)
    learn.dls[0].sampler.generator.set_state(state)


@row('fastai', 'lean', 'defaults')
def fastai(job, variant):
    """Defaults: its TfmdDL, SGD and callbacks, accuracy as a metric. Lean: only the callback that it can't do without and one
    that counts right answers, torch.optim.SGD in its wrapper, the loop's loader."""
    from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper, SGD, TfmdDL, TrainEvalCallback, accuracy
    from fastai.losses import CrossEntropyLossFlat
    from torch.utils.data import TensorDataset
    class Count(Callback):
        def before_validate(self): self.right = 0
        def after_pred(self):
            if not self.training: self.right += (self.pred.argmax(1) == self.y).sum()
    if variant == 'lean':
        def opt_func(params, **kwargs): return OptimWrapper(params, torch.optim.SGD, **kwargs)
        dls, count = DataLoaders(job.batches(), job.slices()), Count()
        learn = Learner(dls, job.model, F.cross_entropy, opt_func, job.lr, default_cbs=False, cbs=[TrainEvalCallback(), count])
        def run():
            learn.fit(1)
            return count.right.item()/len(job.x_valid) if job.has_valid else None
        return run
    order = list(job.sampler())
    train_dl = TfmdDL(TensorDataset(job.x, job.y), job.bs, shuffle=True, num_workers=0, drop_last=True, shuffle_fn=lambda idxs: order)
    valid_dl = TfmdDL(TensorDataset(job.x_valid, job.y_valid), 2*job.bs, num_workers=0) if job.has_valid else []
    learn = Learner(DataLoaders(train_dl, valid_dl), job.model, CrossEntropyLossFlat(), SGD, job.lr, metrics=accuracy)
    def run():
        learn.fit(1)
        return learn.recorder.values[-1][-1] if job.has_valid else None
    return run


@row('Lightning', 'lean', 'defaults')
def lightning(job, variant):
    """Defaults: Trainer as it comes (checkpoint, CSV log, tqdm's bar), training loss and accuracy logged, torch's DataLoader.
    Lean: its barebones mode, right answers counted by hand, the loop's loader."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar
    for name in ('lightning.pytorch', 'lightning.fabric'): logging.getLogger(name).setLevel(logging.ERROR)
    lean = variant == 'lean'
    class Module(LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.right = net, 0
        def configure_optimizers(self): return job.optimizer()
        def training_step(self, batch, i):
            xb, yb = batch
            loss = F.cross_entropy(self.net(xb), yb)
            if not lean: self.log('train_loss', loss)
            return loss
        def validation_step(self, batch, i):
            xb, yb = batch
            right = self.net(xb).argmax(1) == yb
            if lean: self.right += right.sum()
            else: self.log('accuracy', right.float().mean(), prog_bar=True)
    module = Module(job.model)
    options = dict(barebones=True) if lean else dict(callbacks=[TQDMProgressBar()])
    trainer = Trainer(max_epochs=1, accelerator='cpu', devices=1, **options)
    train_dl, valid_dl = (job.batches(), job.slices()) if lean else job.torch_dls()
    def run():
        trainer.fit(module, train_dl, valid_dl if job.has_valid else None)
        if job.has_valid: return module.right.item()/len(job.x_valid) if lean else trainer.callback_metrics['accuracy'].item()
    return run


@row('Ignite', 'lean', 'defaults')
def ignite(job, variant):
    """Defaults: create_supervised_trainer and _evaluator with Accuracy and Loss at the end of the epoch, torch's DataLoader.
    Lean: the loss stays a tensor, Accuracy only, the loop's loader."""
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy, Loss
    lean = variant == 'lean'
    train_dl, valid_dl = (job.batches(), job.slices()) if lean else job.torch_dls()
    options = dict(output_transform=lambda x, y, y_pred, loss: loss) if lean else {}
    trainer = create_supervised_trainer(job.model, job.optimizer(), F.cross_entropy, **options)
    evaluator = create_supervised_evaluator(job.model, {'accuracy': Accuracy()} | ({} if lean else {'loss': Loss(F.cross_entropy)}))
    if job.has_valid: trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(valid_dl))
    def run():
        trainer.run(train_dl, max_epochs=1)
        return evaluator.state.metrics.get('accuracy')
    return run


@row('skorch', 'lean', 'defaults')
def skorch(job, variant):
    """Defaults: NeuralNetClassifier with its callbacks and its table, a given validation set, torch's DataLoader.
    Lean: callbacks='disable', no validation in the epoch but a prediction after it, the loop's loaders."""
    from skorch import NeuralNetClassifier
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split
    common = dict(module=job.model, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=job.lr, max_epochs=1,
                  batch_size=job.bs)
    if variant == 'lean':
        net = NeuralNetClassifier(**common, callbacks='disable', verbose=0, train_split=None,
                                  iterator_train=lambda ds, **kwargs: job.batches(), iterator_valid=lambda ds, **kwargs: job.slices())
        right = job.y_valid.numpy()
        def run():
            net.fit(job.x, job.y)
            return (net.predict(job.x_valid) == right).mean().item() if job.has_valid else None
        return run
    net = NeuralNetClassifier(**common, iterator_train__sampler=job.sampler(), iterator_train__drop_last=True,
                              iterator_valid__batch_size=2*job.bs,
                              train_split=predefined_split(Dataset(job.x_valid, job.y_valid)) if job.has_valid else None)
    def run():
        net.fit(job.x, job.y)
        return net.history[-1, 'valid_acc'] if job.has_valid else None
    return run


@row('Accelerate', 'lean', 'defaults')
def accelerate(job, variant):
    """Defaults: everything through Accelerator.prepare, torch's DataLoader, gather_for_metrics. Lean: model and optimizer prepared,
    the loop's loader."""
    from accelerate import Accelerator
    accelerator, lean = Accelerator(cpu=True), variant == 'lean'
    model, opt = accelerator.prepare(job.model, job.optimizer())
    train_dl, valid_dl = (job.batches(), job.slices()) if lean else accelerator.prepare(*job.torch_dls())
    def run():
        model.train()
        for xb, yb in train_dl:
            opt.zero_grad()
            accelerator.backward(F.cross_entropy(model(xb), yb))
            opt.step()
        if not job.has_valid: return None
        if lean: return job.accuracy(model)
        model.eval()
        right = 0
        for xb, yb in valid_dl:
            with torch.no_grad(): pred = model(xb).argmax(1)
            pred, yb = accelerator.gather_for_metrics((pred, yb))
            right += (pred == yb).sum().item()
        return right/len(job.x_valid)
    return run


@row('Keras', 'lean', 'defaults')
def keras(job, variant):
    """Defaults: its layers, model.fit on arrays, shuffled by itself, its bar and accuracy as a metric. Lean: the torch model in
    its wrapper, no bar, a torch DataLoader that gives whole batches, accuracy counted by hand after the epoch."""
    import keras
    lean = variant == 'lean'
    class Wrapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.TorchModuleWrapper(job.model)
        def call(self, x): return self.inner(x)
    model = Wrapped() if lean else keras.Sequential([keras.Input(job.x.shape[1:]), *_keras_layers(keras, job.model)])
    options = {} if lean else dict(metrics=['accuracy'])
    model.compile(keras.optimizers.SGD(job.lr), keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    first = {k: v.clone() for k, v in job.model.state_dict().items()}
    model.train_on_batch(job.x[:job.bs], job.y[:job.bs])  # builds it, untimed
    if lean: job.model.load_state_dict(first)
    else: _copy(job.model, model, into_keras=True)
    n = len(job.batches())*job.bs
    def run():
        if lean:
            model.fit(job.torch_fast_dl(), epochs=1, verbose=0)
            return job.accuracy(model)
        valid = dict(validation_data=(job.x_valid, job.y_valid), validation_batch_size=2*job.bs) if job.has_valid else {}
        logs = model.fit(job.x[:n], job.y[:n], batch_size=job.bs, epochs=1, **valid).history
        _copy(job.model, model, into_keras=False)
        return logs['val_accuracy'][-1] if job.has_valid else None
    return run


def _keras_layers(keras, model):
    "The layers of a torch model, in Keras's own kinds."
    for layer in model.modules():
        if isinstance(layer, nn.Linear): yield keras.layers.Dense(layer.out_features)
        elif isinstance(layer, nn.ReLU): yield keras.layers.ReLU()
        elif isinstance(layer, nn.Flatten): yield keras.layers.Flatten()
        elif isinstance(layer, nn.Conv2d):
            yield keras.layers.Conv2D(layer.out_channels, layer.kernel_size, layer.stride, data_format='channels_first')


@torch.no_grad()
def _copy(ours, theirs, into_keras):
    "Weights between a torch model and the same in Keras, whose kernels have their outputs last."
    for p, v in zip(ours.parameters(), theirs.trainable_weights):
        view = v.value.permute(3, 2, 0, 1) if p.ndim == 4 else v.value.T if p.ndim == 2 else v.value
        if into_keras: view.copy_(p)
        else: p.copy_(view)


@row('JAX', 'lean', 'defaults')
def jax_optax(job, variant):
    """XLA told to use one thread. Defaults: a jitted step of optax.sgd, fed with numpy batches; accuracy by a jitted function.
    Lean: `lax.scan` over the whole epoch, the rows gathered inside. Compiling is not timed."""
    import jax, optax
    import jax.numpy as jnp
    apply, params = _jax_model(jax, jnp, job.model)
    opt = optax.sgd(job.lr)
    def loss(params, x, y): return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()
    def step(params, state, x, y):
        updates, state = opt.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state
    def scan(params, state, x, y, order):
        def body(carry, idxs): return step(*carry, x[idxs], y[idxs]), None
        return jax.lax.scan(body, (params, state), order)[0]
    def right(params, x, y): return (apply(params, x).argmax(-1) == y).sum()
    x, y, state = job.x.numpy(), job.y.numpy().astype('int32'), opt.init(params)
    order = _order(job)
    if variant == 'lean':
        x, y = jnp.asarray(x), jnp.asarray(y)
        train = jax.jit(scan).lower(params, state, x, y, order).compile()
    else: train = jax.jit(step).lower(params, state, x[order[0]], y[order[0]]).compile()
    count, slices = jax.jit(right), [(xb.numpy(), yb.numpy()) for xb, yb in job.slices()]
    for xb, yb in {len(xb): (xb, yb) for xb, yb in slices}.values(): count(params, xb, yb)
    def run():
        now = params, state
        if variant == 'lean': now = train(*now, x, y, order)
        else:
            for idxs in order: now = train(*now, x[idxs], y[idxs])
        total = sum(count(now[0], xb, yb) for xb, yb in slices)
        _from_jax(job.model, jax.block_until_ready(now[0]))
        return total.item()/len(job.x_valid) if job.has_valid else None
    return run


@row('Flax NNX', 'defaults', works=('mlp', 'tiny'))
def flax_nnx(job, variant):
    "XLA told to use one thread. Its tutorial's train step under nnx.jit, with nnx.Optimizer and optax.sgd, fed with numpy batches."
    import optax
    import jax.numpy as jnp
    from flax import nnx
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(l.in_features, l.out_features, rngs=rngs) for l in _leaves(job.model) if isinstance(l, nn.Linear)])
        def __call__(self, x):
            for layer in self.layers[:-1]: x = nnx.relu(layer(x))
            return self.layers[-1](x)
    net, linears = Net(), [l for l in _leaves(job.model) if isinstance(l, nn.Linear)]
    for mine, theirs in zip(net.layers, linears):
        mine.kernel[...], mine.bias[...] = jnp.asarray(theirs.weight.detach().numpy().T), jnp.asarray(theirs.bias.detach().numpy())
    opt = nnx.Optimizer(net, optax.sgd(job.lr), wrt=nnx.Param)
    def loss(net, x, y): return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()
    @nnx.jit
    def train(net, opt, x, y): opt.update(net, nnx.grad(loss)(net, x, y))
    @nnx.jit
    def right(net, x, y): return (net(x).argmax(-1) == y).sum()
    x, y, order = job.x.numpy(), job.y.numpy().astype('int32'), _order(job)
    first = nnx.state(net)
    train(net, opt, x[order[0]], y[order[0]])
    nnx.update(net, first)
    slices = [(xb.numpy(), yb.numpy()) for xb, yb in job.slices()]
    for xb, yb in {len(xb): (xb, yb) for xb, yb in slices}.values(): right(net, xb, yb)
    def run():
        for idxs in order: train(net, opt, x[idxs], y[idxs])
        total = sum(right(net, xb, yb) for xb, yb in slices)
        with torch.no_grad():
            for mine, theirs in zip(net.layers, linears):
                theirs.weight.copy_(_tensor(mine.kernel[...]).T)
                theirs.bias.copy_(_tensor(mine.bias[...]))
        return total.item()/len(job.x_valid) if job.has_valid else None
    return run


@row('tinygrad', 'defaults', needs='clang')
def tinygrad(job, variant):
    """Its kernels for the CPU on one thread, which need clang. A step of its SGD under TinyJit, fed with numpy batches; accuracy by a
    jitted function. Compiling is not timed."""
    from tinygrad import Context, Tensor, TinyJit
    from tinygrad.nn.optim import SGD
    layers = _leaves(job.model)
    params = [[Tensor(p.detach().numpy().copy()) for p in layer.parameters()] for layer in layers]
    opt = SGD([p for ps in params for p in ps], lr=job.lr)
    def apply(x):
        for layer, p in zip(layers, params):
            if isinstance(layer, nn.Linear): x = x.linear(p[0].T, p[1])
            elif isinstance(layer, nn.ReLU): x = x.relu()
            elif isinstance(layer, nn.Flatten): x = x.flatten(1)
            else: x = x.conv2d(*p, stride=layer.stride)
        return x
    @TinyJit
    @Context(TRAINING=1)
    def train(x, y):
        opt.zero_grad()
        apply(x).sparse_categorical_crossentropy(y).backward()
        opt.step()
    def right(x, y): return (apply(x).argmax(1) == y).sum().realize()
    x, y, order = job.x.numpy(), job.y.numpy().astype('int32'), _order(job)
    slices = [(xb.numpy(), yb.numpy().astype('int32')) for xb, yb in job.slices()]
    count, first = {len(xb): TinyJit(right) for xb, _ in slices}, [p.numpy().copy() for p in opt.params]
    for _ in range(3):  # it compiles at the first calls, for one shape
        train(Tensor(x[order[0]]), Tensor(y[order[0]]))
        for xb, yb in {len(xb): (xb, yb) for xb, yb in slices}.values(): count[len(xb)](Tensor(xb), Tensor(yb))
    for p, old in zip(opt.params, first): p.assign(Tensor(old)).realize()
    def run():
        for idxs in order: train(Tensor(x[idxs]), Tensor(y[idxs]))
        total = sum(count[len(xb)](Tensor(xb), Tensor(yb)).item() for xb, yb in slices)
        with torch.no_grad():
            for mine, theirs in zip(opt.params, job.model.parameters()): theirs.copy_(_tensor(mine.numpy()))
        return total/len(job.x_valid) if job.has_valid else None
    return run


def _order(job):
    "The rows of each batch in the common order, (batches, rows)."
    order = torch.randperm(len(job.x), generator=torch.Generator().manual_seed(SEED))
    return order[:len(job.batches())*job.bs].view(-1, job.bs).numpy().astype('int32')

def _leaves(model): return [m for m in model.modules() if not [*m.children()]]
def _tensor(array): return torch.from_numpy(np.array(array))

def _jax_model(jax, jnp, model):
    "A torch model as a function of parameters and a batch, and its parameters: a pair (weight, bias) a layer."
    layers = _leaves(model)
    params = [tuple(jnp.asarray(p.detach().numpy()) for p in layer.parameters()) for layer in layers]
    def apply(params, x):
        for layer, p in zip(layers, params):
            if isinstance(layer, nn.Linear): x = x @ p[0].T + p[1]
            elif isinstance(layer, nn.ReLU): x = jax.nn.relu(x)
            elif isinstance(layer, nn.Flatten): x = x.reshape(len(x), -1)
            else: x = jax.lax.conv_general_dilated(x, p[0], layer.stride, 'VALID') + p[1][:, None, None]
        return x
    return apply, params

@torch.no_grad()
def _from_jax(model, params):
    for layer, arrays in zip(_leaves(model), params):
        for p, array in zip(layer.parameters(), arrays): p.copy_(_tensor(array))
