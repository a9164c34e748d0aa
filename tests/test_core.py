"""Core: downloads that are cut off, trickle, are refused or never answered."""
import hashlib, http.server, threading, time

import pytest

from talking_face.core import WeightsUnavailable, fetch_file

CONTENT = b'the model' * 20_000


@pytest.fixture
def server():
    "A web server on this machine with one good file, one that stops in the middle, one that trickles, and one that never answers."
    stop = threading.Event()
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments): pass
        def do_GET(self):
            try:
                if self.path == '/silent': stop.wait(20); return
                if self.path == '/absent': self.send_error(404); return
                self.send_response(200); self.send_header('Content-Length', str(len(CONTENT))); self.end_headers()
                if self.path == '/trickle':
                    while not stop.wait(0.05): self.wfile.write(b'x'); self.wfile.flush()
                else: self.wfile.write(CONTENT if self.path == '/good' else CONTENT[:1000])
            except (BrokenPipeError, ConnectionResetError): pass
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True); thread.start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    stop.set(); httpd.shutdown(); httpd.server_close()


def test_fetch(server, tmp_path):
    digest, target = hashlib.sha256(CONTENT).hexdigest(), tmp_path/'deep/model.task'
    assert fetch_file(server + '/good', target, digest) == target and target.read_bytes() == CONTENT
    fetch_file('http://127.0.0.1:1/nowhere', target, digest)     # it is there already: no request
    target.write_bytes(b'damaged'); fetch_file(server + '/good', target, digest)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize('page', ['short', 'absent', 'silent', 'trickle', 'good', 'nobody'])
def test_fetch_fails_quickly_and_leaves_nothing(server, tmp_path, page):
    url = 'http://127.0.0.1:1/x' if page == 'nobody' else f'{server}/{page}'
    start = time.monotonic()
    with pytest.raises(WeightsUnavailable, match=r'^model\.task cannot be fetched from .*model\.task, or wait$'):
        fetch_file(url, tmp_path/'model.task', '0' * 64, 'wait', timeout_s=0.5, total_s=0.5)
    assert time.monotonic() - start < 30 and list(tmp_path.iterdir()) == []
