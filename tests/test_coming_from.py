"The page for those who come from other libraries names what is there, and callbacks refuse what it says they refuse."
import re
from pathlib import Path
import pytest
import exp.all
from exp.nb_10 import EVENTS, Callback, Learner, Recorder

PAGE = (Path(__file__).parent.parent/'nbs/coming_from.md').read_text(encoding='utf-8')
ROWS = [[cell.strip() for cell in line.strip('|').split('|')] for line in PAGE.splitlines() if line.startswith('|') and '---' not in line]
HEADS = [row for row in ROWS if row[-1] == 'here']
BODY = [row for row in ROWS if row[-1] != 'here']
OURS = sorted({name for row in BODY for code in re.findall(r'`([^`]+)`', row[-1]) 
               for name in re.findall(r'(?<![\w=\'"])([A-Za-z_]\w*)(?=\(|$|\.)|([A-Z]\w+)(?=\()', code) for name in name if name})

class Recorded:
    "Attributes that come with a fit."
    recorder = batch = pred = loss = results = failed = training = None

@pytest.mark.parametrize('name', OURS)
def test_what_the_page_names_is_there(name):
    words = {'learn', 'dls', 'cbs', 'opt_func', 'loss_func', 'model', 'lr', 'metrics', 'train', 'valid', 'path', 'mode', 'monitor', 'patience', 'params', 'losses', 'lrs',
             'epochs', 'None', 'x', 'a', 'b', 'dl', 'folder', 'around_pass', 'safetensors', 'raise'}
    places = exp.all, Learner, Recorder, Callback, Recorded, exp.all.SuggestedLRs, exp.all.Interpretation
    assert name in words or name in EVENTS or any(hasattr(place, name) for place in places)


def test_events_of_the_page_are_refused():
    table = PAGE[PAGE.index('## Events of a callback'):]
    lines = [line.strip('|').split('|')[:3] for line in table.splitlines() if line.startswith('| `') or line.startswith('| |')]
    theirs = [name for line in lines for cell in line for name in re.findall(r'`([a-z_]+)`', cell)]
    refused = [name for name in theirs if name not in EVENTS and not name.startswith('train_step')]
    assert len(refused) > 20
    for name in refused:
        with pytest.raises(TypeError, match=name): type('Ported', (Callback,), {name: lambda self, learn: None})


def test_every_table_has_four_columns(): assert {len(row) for row in ROWS} == {4} and len(HEADS) == 4
