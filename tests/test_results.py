"Results as strangers look at them: tables and curves of odd data, and an Interpretation of odd Learners."
import math
from functools import partial
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from exp.nb_00 import set_seed, test_near as near
from exp.nb_02 import Model
from exp.nb_04 import DataLoader, Dataset
from exp.nb_10 import Learner
from exp.nb_15 import Device
from exp.nb_16 import Interpretation, calibration_curve, classification_report, confusion_matrix, plot_matrix


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def scores(n=50, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)

def new_learner(n=50, bs=16, model=None, target=lambda x, y: y, **kwargs):
    "Images of 4 x 4; batches of 16, and a last one of 2."
    set_seed(42)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 16, generator=g)
    y = (x @ torch.randn(16, 3, generator=g)).argmax(1)
    batches = [(xb, target(xb, yb)) for xb, yb in zip(x.split(bs), y.split(bs))]
    return Learner(model() if model else Model(16, 8, 3), (batches, batches), progress=False, **kwargs)

class Heads(nn.Module):
    "A class, a number, and another class."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 3), nn.Linear(16, 1), nn.Linear(16, 2)
    def forward(self, x): return {'a': self.a(x), 'more': (self.b(x), self.c(x))}

def heads(**kwargs):
    def loss(pred, target):
        (b, c), (tb, tc) = pred['more'], target['more']
        return F.cross_entropy(pred['a'], target['a']) + F.mse_loss(b[:, 0], tb) + F.cross_entropy(c, tc)
    return new_learner(model=Heads, loss_func=loss,
                       target=lambda x, y: {'a': y, 'more': (x.mean(1), (x[:, 0] > 0).long())}, **kwargs)


# Tables

def test_a_report_counted_by_hand():
    # target 0: 3 right, 1 taken for 1; target 1: 1 right, 1 taken for 0; target 2: 2 right, 2 taken for 1
    said, target = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    report = classification_report(torch.eye(3)[said], target)
    near(report.precision, [3/4, 1/4, 1.])
    near(report.recall, [3/4, 1/2, 1/2])
    near(report.f1, [3/4, 1/3, 2/3])
    assert report.support.tolist() == [4, 2, 4] and report.called.tolist() == [4, 4, 2]
    near(report.accuracy, 0.6)
    near(report.macro['f1'], (3/4 + 1/3 + 2/3)/3)
    near(report.weighted['precision'], (4*3/4 + 2/4 + 4)/10)
    near(report.weighted['recall'], 0.6)
    assert report.notes() == []


def test_a_report_is_text_and_html():
    report = classification_report(*scores(), labels=['cat', '<dog>', 'a bird with a long name'])
    lines = str(report).splitlines()
    assert len(lines) == 1 + 3 + 3 and len(set(map(len, lines))) == 1 and '<dog>' in lines[2]
    assert lines[0].split() == ['precision', 'recall', 'f1', 'support'] and lines[-1].startswith('weighted average')
    page = report._repr_html_()
    assert page.count('<tr>') == 7 and '&lt;dog&gt;' in page and '<dog>' not in page
    str(report).encode('ascii')


def test_a_class_that_is_never_called_counts_as_nothing_and_is_named():
    pred, target = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 2, 1, 1])
    report = classification_report(pred, target, labels='xyz')
    near(report.precision, [0.5, 1., 0.])
    near(report.recall, [1., 1., 0.])
    near(report.macro['precision'], 0.5)
    assert report.notes() == ['never called: z'] and str(report).endswith('never called: z') and 'never called: z' in report._repr_html_()


def test_an_absent_class_that_is_called():
    report = classification_report(torch.eye(3)[[0, 1, 2]], torch.tensor([0, 1, 1]))
    near(report.recall, [1., 0.5, 0.])
    near(report.precision, [1., 1., 0.])
    near(report.macro['recall'], 0.5)
    assert report.notes() == ['no rows of: 2']


def test_a_class_that_neither_occurs_nor_is_called_is_left_out():
    report = classification_report(torch.eye(4)[[0, 1, 1]], torch.tensor([0, 1, 0]))
    for values in (report.precision, report.recall, report.f1): assert values[2:].isnan().all() and not values[:2].isnan().any()
    near(report.macro['recall'], 0.75)
    near(report.weighted['recall'], 2/3)
    assert report.notes() == ['never called: 2, 3', 'no rows of: 2, 3'] and str(report).splitlines()[3].split() == ['2', '-', '-', '-', '0']


@pytest.mark.parametrize('seed', range(5))
def test_the_same_as_scikit_learn(seed):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is not installed')
    pred, target = scores(40, 6, seed)
    target[target == 5] = 0
    ours, said = classification_report(pred, target), pred.argmax(1)
    theirs = metrics.classification_report(target, said, output_dict=True, zero_division=0)
    for name, row in (('macro', 'macro avg'), ('weighted', 'weighted avg')):
        near(list(getattr(ours, name).values()), [theirs[row][k] for k in ('precision', 'recall', 'f1-score')])
    assert metrics.confusion_matrix(target, said, labels=range(6)).tolist() == confusion_matrix(pred, target).tolist()


def test_the_same_as_torchmetrics():
    tm = pytest.importorskip('torchmetrics.functional.classification', reason='torchmetrics is not installed')
    pred, target = scores(500, 6)
    near(calibration_curve(3*pred, target, 15).ece, tm.multiclass_calibration_error((3*pred).softmax(1), target, 6, n_bins=15))
    near(classification_report(pred, target).f1, tm.multiclass_f1_score(pred, target, 6, average='none'))


@pytest.mark.parametrize('labels', [['a', 'b', 'c'], 'abc', {0: 'a', 1: 'b', 2: 'c'}, np.array(['a', 'b', 'c']), ('a', 'b', 'c')])
def test_names_of_classes(labels):
    learn = new_learner()
    interp = learn.interpret(labels=labels)
    assert interp.report().labels == ['a', 'b', 'c'] and {*interp.most_confused()[0][:2]} <= {*'abc'}
    titles = [ax.get_title() for ax in interp.show_results(3).flat]
    assert all(title[0] in 'abc' and title[-1] in 'abc' for title in titles)
    assert [t.get_text() for t in interp.plot_confusion_matrix().get_yticklabels()] == ['a', 'b', 'c']


def test_too_few_names():
    for call in (lambda: classification_report(*scores(), labels='ab'), lambda: plot_matrix(torch.eye(3).long(), 'abcd'), lambda: new_learner().plot_confusion_matrix(labels='a')):
        with pytest.raises(ValueError, match='expected 3 labels, one for each class, got'): call()


@pytest.mark.parametrize('func', [confusion_matrix, classification_report, calibration_curve])
@pytest.mark.parametrize('pred, target, said', [
    (torch.zeros(5, 1), torch.zeros(5).long(), r'one column: F.pad\(pred, \(1, 0\)\)'), (torch.zeros(5), torch.zeros(5).long(), r'got \(5,\) and \(5,\)'),
    (torch.zeros(5, 3), torch.zeros(5), 'of torch.float32'), (torch.zeros(5, 3), torch.zeros(4).long(), r'got \(5, 3\) and \(4,\)'),
    (torch.zeros(5, 3), torch.zeros(5, 1).long(), r'and \(5, 1\)'), (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), r'got \(2, 3, 4\)'),
    (torch.zeros(2, 3), torch.tensor([0, 3]), 'targets in 0 to 2, got 0 to 3'), (torch.zeros(2, 3), torch.tensor([0, -1]), 'got -1 to 0'),
    (torch.tensor([[0., math.nan], [0, 1]]), torch.tensor([0, 1]), 'got nan or inf in 1 of 2 rows'),
    (torch.tensor([[0., math.inf], [0, 1]]), torch.tensor([0, 1]), 'got nan or inf in 1 of 2 rows')])
def test_what_is_no_classification_is_refused_by_name(func, pred, target, said):
    with pytest.raises(ValueError, match=said): func(pred, target)


def test_one_column_made_into_two():
    z, target = torch.randn(30, generator=torch.Generator().manual_seed(0))[:, None], scores(30, 2)[1]
    pred = F.pad(z, (1, 0))
    assert torch.equal(pred.argmax(1), (z[:, 0] > 0).long())
    sure = torch.maximum(z.sigmoid(), 1 - z.sigmoid())[:, 0]
    curve = calibration_curve(pred, target)
    near(float((curve.confidence*curve.rows).nansum()/30), float(sure.mean()))


@pytest.mark.parametrize('ignored', [-100, -1, 0, 2])
def test_targets_that_do_not_count(ignored):
    pred, target = scores()
    target[::3] = ignored
    counts = target != ignored
    args = {} if ignored == -100 else {'ignore_index': ignored}
    assert torch.equal(confusion_matrix(pred, target, **args), confusion_matrix(pred[counts], target[counts]))
    near(calibration_curve(pred, target, **args).ece, calibration_curve(pred[counts], target[counts]).ece)
    near(classification_report(pred, target, **args).macro['f1'], classification_report(pred[counts], target[counts]).macro['f1'])
    assert confusion_matrix(pred, target, **args).sum() == counts.sum()


def test_nan_in_a_row_that_does_not_count():
    pred, target = scores()
    pred[3], target[3] = math.nan, -100
    assert confusion_matrix(pred, target).sum() == 49


def test_no_rows():
    empty = torch.zeros(0, 3), torch.zeros(0).long()
    assert confusion_matrix(*empty).tolist() == [[0]*3]*3
    for func in (classification_report, calibration_curve):
        for pred, target in (empty, (torch.zeros(4, 3), torch.full((4,), -100))):
            with pytest.raises(ValueError, match='at least one row that counts, got none'): func(pred, target)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_widths(dtype):
    pred, target = scores(500)
    pred = pred.to(dtype)
    assert torch.equal(confusion_matrix(pred, target), confusion_matrix(pred.float(), target))
    near(calibration_curve(pred, target).ece, calibration_curve(pred.float(), target).ece, atol=1e-3)


def test_arrays_and_lists():
    pred, target = scores()
    assert torch.equal(confusion_matrix(pred.numpy(), target.numpy()), confusion_matrix(pred, target))
    assert torch.equal(confusion_matrix(pred.tolist(), target.tolist()), confusion_matrix(pred, target))
    near(calibration_curve(pred.numpy(), target.numpy()).ece, calibration_curve(pred, target).ece)


# Calibration

def test_a_curve_counted_by_hand():
    pred = torch.tensor([[0.55, 0.45], [0.55, 0.45], [0.3, 0.7], [1., 0.]])
    curve = calibration_curve(pred, torch.tensor([0, 1, 1, 1]), n_bins=4)
    assert curve.rows.tolist() == [0, 0, 3, 1]
    near(curve.accuracy[2:], [2/3, 0.])
    near(curve.confidence[2:], [0.6, 1.])
    near(curve.ece, 3/4*(2/3 - 0.6) + 1/4)
    assert curve.accuracy[:2].isnan().all() and curve.confidence[:2].isnan().all()


def test_bins_are_closed_on_the_right():
    pred = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.25, 0.], [1., 0, 0]])
    assert calibration_curve(pred, torch.zeros(3).long(), 4).rows.tolist() == [0, 1, 1, 1]
    assert calibration_curve(pred, torch.zeros(3).long(), 1).rows.tolist() == [3]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('scale', [1., 4.])
def test_a_calibrated_model_and_one_that_is_too_sure(seed, scale):
    g = torch.Generator().manual_seed(seed)
    pred = scale*torch.randn(100_000, 5, generator=g)
    target = torch.multinomial(pred.softmax(1), 1, generator=g)[:, 0]
    assert calibration_curve(pred, target).ece < 0.007
    assert calibration_curve(2*pred, target).ece > 0.03
    near(calibration_curve(pred.softmax(1), target).ece, calibration_curve(pred, target).ece)
    near(calibration_curve(pred.log_softmax(1), target).ece, calibration_curve(pred, target).ece)


def test_what_is_half_probabilities_is_scores():
    pred = torch.tensor([[0.2, 0.8], [3., -2.]])
    near(calibration_curve(pred, torch.tensor([1, 0]), 1).confidence, pred.softmax(1).amax(1).mean()[None])
    near(calibration_curve(torch.tensor([[0.2, 0.8], [0.9, 0.1]]), torch.tensor([1, 0]), 1).confidence, [0.85])
    near(calibration_curve(torch.eye(3), torch.arange(3)).ece, 0.)


@pytest.mark.parametrize('n_bins', [0, -1, 2.5, True, '10'])
def test_bins_that_make_no_sense(n_bins):
    with pytest.raises(ValueError, match='n_bins to be a whole number of at least 1'): calibration_curve(*scores(), n_bins=n_bins)
    with pytest.raises(ValueError, match='n_bins'): new_learner().plot_calibration(n_bins=n_bins)


def test_figures_are_drawn_where_asked():
    learn = new_learner()
    axs = plt.subplots(1, 2)[1]
    assert learn.plot_calibration(n_bins=5, ax=axs[0]) is axs[0] and learn.plot_confusion_matrix(ax=axs[1]) is axs[1]
    near(float(axs[0].get_title().split()[1]), learn.interpret().calibration(5).ece, atol=1e-4)
    axs[0].figure.canvas.draw()
    assert [t.get_text() for t in axs[1].texts if t.get_text()] == [str(n) for n in confusion_matrix(*learn.get_preds()).flatten().tolist() if n]


# Interpretation

def test_everything_from_one_pass():
    learn, passes = new_learner(), []
    class Counted:
        def __iter__(self):
            passes.append(0)
            return iter(learn.dls[1])
    interp = learn.interpret(Counted())
    assert isinstance(interp, Interpretation)
    interp.show_results(), interp.top_losses(3), interp.report(), interp.most_confused(), interp.plot_confusion_matrix(), interp.plot_calibration()
    assert len(passes) == 1


def test_a_generator_is_enough():
    learn = new_learner()
    interp = learn.interpret(iter(learn.dls[1]))
    assert interp.report().support.sum() == 50 and len(interp.show_results(3).flat) == 3


def test_the_short_methods_agree_with_the_interpretation():
    learn = new_learner()
    interp = learn.interpret()
    for a, b in zip(learn.top_losses(7), interp.top_losses(7)): assert torch.equal(a, b)
    titles = [[ax.get_title() for ax in axs.flat] for axs in (learn.show_results(), interp.show_results())]
    assert titles[0] == titles[1] and len(titles[0]) == 10


def test_a_ragged_last_batch_and_more_than_there_is():
    learn = new_learner()
    interp = learn.interpret()
    losses, idxs = interp.top_losses(1000)
    assert len(losses) == 50 and sorted(idxs.tolist()) == list(range(50)) and losses.tolist() == sorted(losses.tolist(), reverse=True)
    near(losses.mean(), learn.validate()['valid_loss'])
    assert sum(bool(ax.images) for ax in interp.show_results(1000).flat) == 16
    assert sum(bool(ax.images) for ax in learn.show_results(1000, [learn.dls[1][-1]]).flat) == 2


def test_a_dataset_and_its_last_row():
    learn = new_learner()
    x, y = (torch.cat(field) for field in zip(*learn.dls[1]))
    assert torch.equal(learn.interpret(Dataset(x, y)).confusion_matrix(), learn.interpret().confusion_matrix())
    assert learn.interpret(DataLoader(Dataset(x, y), 7, shuffle=True)).confusion_matrix().sum() == 50


def test_no_data_and_no_targets():
    learn = new_learner()
    x = torch.zeros(4, 16)
    for call in (learn.interpret, learn.show_results, learn.top_losses, learn.plot_confusion_matrix, learn.plot_calibration):
        with pytest.raises(ValueError, match='got none'): call(dl=[])
        with pytest.raises(ValueError, match='expected batches with targets, got inputs alone'): call(dl=[x])
    with pytest.raises(TypeError, match='got a Tensor of inputs'): learn.interpret(x)
    learn.dls = learn.dls[0], None
    with pytest.raises(ValueError, match='got None'): learn.interpret()
    assert learn.batch is None and learn.depth == 0


@pytest.mark.parametrize('n', [0, -1, 2.5, True])
def test_numbers_that_make_no_sense(n):
    interp = new_learner().interpret()
    for call in (interp.top_losses, interp.show_results, interp.most_confused):
        with pytest.raises(ValueError, match='whole number of at least 1'): call(n)


def test_most_confused_by_hand():
    said, target = torch.tensor([0, 1, 1, 1, 2, 2, 0, 2, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    learn = Learner(nn.Identity(), (None, [(torch.eye(3)[said], target)]), progress=False)
    interp = learn.interpret(labels='abc')
    assert interp.most_confused() == [('a', 'b', 3), ('b', 'c', 2), ('c', 'a', 1)]
    assert interp.most_confused(2) == [('a', 'b', 3), ('b', 'c', 2)] and interp.most_confused(4) == []


def test_a_weighted_loss_sorts_by_its_weights():
    weight = torch.tensor([1., 9., 0.1])
    learn = new_learner(loss_func=nn.CrossEntropyLoss(weight))
    pred, target = learn.get_preds()
    near(learn.interpret().top_losses(5)[0], F.cross_entropy(pred, target, weight, reduction='none').topk(5).values)


def test_pictures_alone_need_one_batch():
    learn, dealt = new_learner(), []
    def batches():
        for batch in learn.dls[1]:
            dealt.append(0)
            yield batch
    learn.show_results(3, batches())
    assert len(dealt) == 1


def test_a_loader_that_uses_its_tensors_again():
    learn = new_learner(n=48)
    class Again:
        def __iter__(self):
            x, y = torch.zeros(16, 16), torch.zeros(16, dtype=torch.long)
            for xb, yb in learn.dls[1]:
                x.copy_(xb), y.copy_(yb)
                yield x, y
    images = [[ax.images[0].get_array().tolist() for ax in view.show_results(4).flat] for view in (learn.interpret(), learn.interpret(Again()))]
    assert images[0] == images[1]
    assert torch.equal(learn.interpret(Again()).confusion_matrix(), learn.interpret().confusion_matrix())


def test_several_outputs_leaf_by_leaf():
    interp = heads().interpret()
    with pytest.raises(ValueError, match=r'one output and one target, got 3 and 3: choose with part\(i\)'): interp.report()
    assert interp.part(0, labels='abc').report().labels == ['a', 'b', 'c'] and interp.part(2).confusion_matrix().shape == (2, 2)
    assert interp.part(2).calibration().rows.sum() == 50
    with pytest.raises(ValueError, match='torch.float32'): interp.part(1).report()
    for i in (3, -1, 0.5):
        with pytest.raises(ValueError, match='expected one of 3|whole number'): interp.part(i)
    with pytest.raises(ValueError, match='choose with part'): interp.report()  # unchanged
    assert all(ax.get_title().count('→') == 3 for ax in interp.show_results(4).flat)
    assert torch.equal(interp.part(0).top_losses(5)[0], interp.top_losses(5)[0])


def test_more_outputs_than_targets():
    learn = new_learner(model=Heads, loss_func=lambda pred, target: F.cross_entropy(pred['a'], target))
    interp = learn.interpret()
    with pytest.raises(ValueError, match='got 3 and 1'): interp.report()
    with pytest.raises(ValueError, match='a target for each of 3 predictions, got 1'): interp.show_results()
    assert interp.part(0).report().support.sum() == 50 and len(interp.top_losses(3)[0]) == 3


@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(ignore_index=1), partial(F.cross_entropy, ignore_index=1)])
def test_the_loss_function_says_what_does_not_count(loss_func):
    learn = new_learner(loss_func=loss_func)
    interp, target = learn.interpret(), learn.get_preds()[1]
    assert interp.report().support.tolist() == [(target == 0).sum(), 0, (target == 2).sum()]
    assert interp.calibration().rows.sum() == (target != 1).sum()
    losses, idxs = interp.top_losses(50)
    assert (losses[target[idxs] == 1] == 0).all()


def test_ignored_targets_have_no_name():
    def some(x, y): return torch.where(torch.arange(len(y)) == 0, -100, y)
    titles = [ax.get_title() for ax in new_learner(target=some).show_results(3, labels='abc').flat]
    assert titles[0].startswith('-100 → ') and titles[1][0] in 'abc'


def test_a_regression_has_pictures_and_losses_but_no_table():
    learn = new_learner(model=lambda: nn.Linear(16, 1), target=lambda x, y: x.sum(1, keepdim=True), loss_func=F.mse_loss)
    interp = learn.interpret()
    pred, target = learn.get_preds()
    near(interp.top_losses(4)[0], (pred - target).square()[:, 0].topk(4).values)
    assert '→' in interp.show_results(2).flat[0].get_title()
    for view in (interp.report, interp.plot_confusion_matrix, interp.plot_calibration, interp.most_confused):
        with pytest.raises(ValueError, match='expected scores'): view()


def test_what_is_no_picture_is_refused():
    learn = Learner(nn.Linear(5, 3), (None, [(torch.zeros(4, 5), torch.zeros(4).long())]), progress=False)
    with pytest.raises(ValueError, match='got shape'): learn.show_results()
    assert learn.batch is None and learn.depth == 0


def test_pictures_in_colour():
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    learn = Learner(model(), (None, [(torch.rand(4, 3, 4, 4), torch.zeros(4).long())]), progress=False)
    assert learn.show_results().flat[0].images[0].get_array().shape == (4, 4, 3)


def test_the_learner_is_left_as_it_was():
    learn = new_learner(cbs=Device('cpu'))
    learn.fit(1)
    before = {k: v for k, v in vars(learn).items() if k in ('batch', 'pred', 'loss', 'depth', 'by_loss_func', 'results')}
    params = [p.clone() for p in learn.model.parameters()]
    interp = learn.interpret()
    interp.top_losses(), interp.show_results(), interp.report()
    assert {k: vars(learn)[k] for k in before} == before and learn.model.training
    assert all(map(torch.equal, params, learn.model.parameters())) and not interp.preds.requires_grad


def test_an_interpretation_of_half_precision():
    learn = new_learner(model=lambda: Model(16, 8, 3).bfloat16(), target=lambda x, y: y)
    learn.dls = None, [(x.bfloat16(), y) for x, y in learn.dls[1]]
    interp = learn.interpret()
    assert interp.preds.dtype is torch.float32 and interp.report().support.sum() == 50
    interp.show_results(), interp.top_losses(2), interp.plot_calibration()
