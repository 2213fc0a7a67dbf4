"The site, as a reader meets it: every page whole, typeset, accessible and within a phone's width; search, dark mode, downloads."
import json, sys
import pytest
from places import ROOT, SITE

sys.path.insert(0, str(ROOT/'tests'))
from links import site as site_links

AXE = ROOT/'.venv/npm/axe-core/axe.min.js'
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob('*.html') if '_static' not in p.parts)
ALIKE = 'reference/nb_00.html', 'reference/nb_10.html', 'reference/nb_42.html'  # the pages of the reference have one form
WHOLE = '() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))'
UNSAID = '() => [...document.querySelectorAll("article img")].filter(i => !(i.alt || "").trim()).length'
MATHS = '() => [document.querySelectorAll("article .math").length, document.querySelectorAll("article mjx-container svg").length, document.querySelectorAll("mjx-merror, [data-mjx-error]").length]'
TWICE = '() => { const ids = [...document.querySelectorAll("[id]")].filter(e => !e.closest("svg")).map(e => e.id); return ids.filter((id, i) => ids.indexOf(id) < i) }'
# the parts of formulas and coloured code are alike on all pages, and nine tenths of the elements: one page has them checked
PLAIN = '''() => { for (const p of document.querySelectorAll(".highlight pre")) p.textContent = p.textContent;
    for (const m of document.querySelectorAll("mjx-container")) m.remove() }'''
WIDE = '''() => [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > 413 && getComputedStyle(e).position != "fixed"
    && !e.closest("pre, table, mjx-container, dialog, .bd-sidebar-primary, .bd-sidebar-secondary")).slice(0, 5).map(e => e.tagName + "." + e.className)'''


def test_all_pages_are_there():
    if not PAGES: pytest.skip('the site is not built: make browser')
    for p in NOTEBOOKS: assert f'{p.stem}.html' in PAGES and f'reference/nb_{p.stem[:2]}.html' in PAGES


@pytest.mark.parametrize('name', PAGES)
def test_page(name, visit, site):
    page = visit.page
    page.goto(f'{site}/{name}')
    page.wait_for_function('() => document.readyState == "complete"')
    if page.query_selector('article .math'): page.wait_for_function('() => window.MathJax && MathJax.startup && MathJax.startup.promise')
    page.evaluate('() => window.MathJax && MathJax.startup && MathJax.startup.promise')
    assert page.evaluate(WHOLE) == [] and page.evaluate(UNSAID) == 0 and page.evaluate(TWICE) == []
    formulas, typeset, wrong = page.evaluate(MATHS)
    assert typeset >= formulas and wrong == 0
    desktop = page.viewport_size
    page.set_viewport_size(dict(width=412, height=900))
    assert page.evaluate('() => document.documentElement.scrollWidth') <= 412, page.evaluate(WIDE)
    assert visit.faults == []
    page.set_viewport_size(desktop)
    if name.startswith('reference/') and name not in ALIKE: return
    if name != '03_losses.html': page.evaluate(PLAIN)
    page.add_script_tag(path=AXE)
    found = page.evaluate('() => axe.run(document, {resultTypes: ["violations"]})')['violations']
    assert [(v['id'], v['impact'], v['nodes'][0]['html'][:200], len(v['nodes'])) for v in found if v['impact'] in ('serious', 'critical')] == []


def test_the_reference_is_whole():
    "Every exported name has an entry, and every notebook its changes."
    import importlib
    if not PAGES: pytest.skip('the site is not built: make browser')
    changes = (SITE/'changes.html').read_text()
    for p in NOTEBOOKS:
        number = p.stem[:2]
        text = (SITE/f'reference/nb_{number}.html').read_text()
        for name, value in ((n, getattr(importlib.import_module(f'exp.nb_{number}'), n)) for n in importlib.import_module(f'exp.nb_{number}').__all__):
            anchor = f'nb-{number}-{"class-" if isinstance(value, type) else ""}{name.lower()}'.replace('_', '-')
            assert f'id="{anchor}"' in text and f'#{anchor}"' in changes, anchor
    assert '#nb-11-learner-lr-find"' in changes and 'reference/nb_30.html' in changes


def test_links():
    if not PAGES: pytest.skip('the site is not built: make browser')
    inside, broken, outside = site_links(SITE)
    assert inside > 1000 and broken == []


def test_search_finds(visit, site):
    visit.page.goto(f'{site}/search.html?q=fit_one_cycle')
    visit.page.wait_for_selector('#search-results li a')
    visit.page.wait_for_function('() => [...document.querySelectorAll("#search-results li a")].some(a => a.href.includes("reference/nb_11.html"))')
    visit.page.locator('#search-results li a[href*="nb_11"]').first.click()
    visit.page.wait_for_url('**/reference/nb_11.html*')
    assert visit.faults == []


def test_dark(visit, site):
    visit.page.goto(f'{site}/03_losses.html')
    color = lambda: visit.page.evaluate('() => getComputedStyle(document.body).backgroundColor')
    before = color()
    visit.page.locator('button.theme-switch-button:visible').first.click()
    visit.page.locator('button.theme-change-button[data-mode="dark"]:visible').first.click()
    visit.page.wait_for_function('() => document.documentElement.dataset.theme == "dark"')
    visit.page.wait_for_timeout(500)  # colours fade
    after = color()
    assert sum(map(int, after[4:-1].split(',')[:3])) < 200 < sum(map(int, before[4:-1].split(',')[:3]))


def test_a_notebook_page(visit, site):
    "Previous and next, Colab, the notebook itself to download, solutions folded, links to the reference and back."
    page = visit.page
    page.goto(f'{site}/11_schedules.html')
    assert '10_learner' in page.get_attribute('a.left-prev', 'href') and '12_optimizers' in page.get_attribute('a.right-next', 'href')
    links = page.evaluate('() => [...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href"))')
    colab, = {link for link in links if 'colab.research' in link}
    assert colab.endswith('/blob/main/nbs/11_schedules.ipynb')
    source, = {link for link in links if link.endswith('_sources/11_schedules.ipynb')}
    assert json.loads((SITE/source).read_text()) == json.loads((ROOT/'nbs/11_schedules.ipynb').read_text())
    assert page.evaluate('() => document.querySelectorAll("article details[open]").length') == 0
    page.click('.built a >> text=Scheduler')
    page.wait_for_url('**/reference/nb_11.html*')
    assert page.locator('h2', has_text='Scheduler').first.is_visible()
    page.locator('a', has_text='Where it is built').first.click()
    page.wait_for_url('**/11_schedules.html*')
    assert visit.faults == []
