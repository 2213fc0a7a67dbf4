"Internal links of notebooks and pages lead somewhere. The site's are checked in tests/browser."
import json
import pytest
from links import broken_in_page, pages


@pytest.mark.parametrize('path', pages(), ids=lambda p: p.name)
def test_internal_links(path): assert broken_in_page(path) == []


def test_what_is_broken_is_found(tmp_path):
    cell = lambda text: dict(cell_type='markdown', metadata={}, source=text)
    page = tmp_path/'a.ipynb'
    page.write_text(json.dumps(dict(cells=[cell('# A title\n[a](#A-title) [b](#a-title) [c](b.ipynb)'), cell('`[d](e)` [f](a.ipynb#A-title) [g](a.ipynb#x) [h](http://x)')])))
    assert broken_in_page(page) == ['#a-title', 'b.ipynb', 'a.ipynb#x']
    page = tmp_path/'b.md'
    page.write_text('# A title, again\n[a](#a-title-again) [b](#A-title-again)\n[c](a.ipynb#A-title)')
    assert broken_in_page(page) == ['#A-title-again']
