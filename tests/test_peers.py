"The table in the README is the output of `make bench-peers`, and every peer was measured; nothing is timed here."
import json
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT/'tests/benchmarks/results'
LIBRARIES = ('by hand', 'exp, our SGD', 'exp, torch SGD', 'fastai', 'Lightning', 'Ignite', 'skorch', 'Accelerate', 'Keras')
result = json.loads((RESULTS/'peers.json').read_text())


def test_the_readme_shows_the_output():
    front, rest = (ROOT/'README.md').read_text().split('<!-- peers: written by make bench-peers -->\n\n')
    table = rest.split('\n\n<!-- peers: end -->')[0]
    assert table in (RESULTS/'peers.md').read_text() and all(f'| {library} |' in table for library in LIBRARIES)


@pytest.mark.parametrize('work', ('mlp', 'tiny', 'cnn'))
def test_every_library_is_measured(work):
    rows = result['works'][work]
    for row in (f'{library}, {variant}' for library in LIBRARIES for variant in ('lean', 'defaults')):
        assert len(rows[row]['rounds']) == result['rounds'] >= 7
        assert rows[row]['ratio']['low'] <= rows[row]['ratio']['median'] <= rows[row]['ratio']['high']


@pytest.mark.parametrize('work', ('mlp', 'tiny', 'cnn'))
def test_every_row_does_the_same_work(work):
    "The same weights at the end, but for Keras with its defaults, which shuffles for itself; the accuracy is near the loop's."
    rows = result['works'][work]
    for label, row in rows.items():
        if row['library'] in LIBRARIES and label != 'Keras, defaults': assert row['difference'] < 1e-4, label
        near = 0.05 if (work, label) == ('cnn', 'Keras, defaults') else 0.02  # its order, in a training that has just begun
        if row['accuracy']: assert abs(row['accuracy'] - rows['by hand, lean']['accuracy']) < near, label


@pytest.mark.parametrize('work, more', [('mlp', ('JAX, lean', 'Flax NNX, defaults', 'tinygrad, defaults')), ('cnn', ('exp, our SGD, channels_last',)),
                                        ('cnn2', ('by hand, again', 'exp, our SGD, defaults', 'exp, our SGD, channels_last'))])
def test_the_later_rows_are_measured(work, more):
    "Recorded and compiled, of the same weights; JAX and tinygrad; a network on two threads."
    rows = result['works'][work]
    ways = [f'exp, {way}, {variant}' for way in ('Record', 'Compile', 'Compile(step=True)') for variant in ('lean', 'defaults')]
    for row in (*ways, *more): assert len(rows[row]['rounds']) == result['rounds'], row
    for row in ways: assert rows[row]['difference'] < 1e-4, row


def test_loading_and_growth_are_measured():
    works = result['works']
    assert {'x[idx]', 'exp, DataLoader', 'torch, DataLoader, default', 'fastai, TfmdDL'} <= works['loading'].keys()
    assert all(row['difference'] == 0 for row in works['loading'].values())  # the last batch
    assert [row['variant'] for row in works['data'].values()] == ['1x', '2x', '4x', '8x']
    assert len(works['callbacks']) == 13
    assert (RESULTS/'peers.png').stat().st_size < 100_000
