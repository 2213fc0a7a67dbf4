"Chromium, driven by Playwright. What needs it is skipped where it is not installed, and says so."
import functools, http.server, os, shutil, threading
from pathlib import Path
import pytest
from places import SITE

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def pytest_collection_modifyitems(items):
    if os.environ.get('BROWSER_TESTS'): return
    for item in items:
        if Path(__file__).parent in item.path.parents: item.add_marker(pytest.mark.skip(reason='takes minutes: make browser'))


@pytest.fixture(scope='session')
def chromium():
    if not CHROMIUM: pytest.skip('no Chromium on this machine')
    sync_api = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed: make browser')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run'])
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def site():
    "The address of the built site, on loopback."
    if not (SITE/'index.html').exists(): pytest.skip('the site is not built: make browser')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


class Visit:
    "A page in the browser that may only ask loopback, and what went wrong on it."
    def __init__(self, browser, **options):
        self.context = browser.new_context(**options)
        self.page, self.faults = self.context.new_page(), []
        self.page.route('**/*', self.only_here)
        self.page.on('console', lambda m: self.faults.append(m.text) if m.type == 'error' else None)
        self.page.on('pageerror', lambda e: self.faults.append(str(e)))
        self.page.on('response', lambda r: self.faults.append(f'{r.status} {r.url}') if r.status >= 400 else None)

    def only_here(self, route):
        if route.request.url.startswith(('http://127.0.0.1', 'data:', 'blob:')): return route.continue_()
        self.faults.append(f'asks for {route.request.url}')
        route.abort()


@pytest.fixture
def visit(chromium, request):
    v = Visit(chromium, **getattr(request, 'param', {}))
    yield v
    v.context.close()
