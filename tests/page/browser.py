"""Opens a page in Qt's Chromium without a screen, runs a script in it, takes a screenshot; its own process.

    python browser.py PAGE.html OUT.json [--dark] [--width W] [--screenshot OUT.png] [--pdf OUT.pdf] [--script JS [--then JS]]

OUT.json holds the value of the script, an expression, or of the one after `--then` half a second later, the console's messages,
and every address that was asked for. A crash of Chromium is then a failed process, not the end of the test run.
"""

import argparse
import json
import os
import sys
from pathlib import Path

DEADLINE_MS = 40_000


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--pdf", type=Path)
    parser.add_argument("--script", default="null")
    parser.add_argument("--then")
    arguments = parser.parse_args()

    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    # The sandbox refuses to start as root, as in containers. 0 is dark, 1 light.
    scheme = f"--blink-settings=preferredColorScheme={0 if arguments.dark else 1}"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"--no-sandbox --disable-gpu {scheme}"
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    found = {"console": [], "requests": [], "result": None, "is_loaded": False}

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            found["requests"].append(info.requestUrl().toString()[:200])

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            found["console"].append(f"{level.name}: {message} ({source[:80]}:{line})")

    profile = QWebEngineProfile()
    interceptor = Interceptor()
    profile.setUrlRequestInterceptor(interceptor)
    page = Page(profile)
    view = QWebEngineView()
    view.setPage(page)
    view.resize(arguments.width, arguments.height)
    view.show()

    def finish():
        arguments.out.write_text(json.dumps(found))
        if arguments.screenshot:
            view.grab().save(str(arguments.screenshot))
        if arguments.pdf:
            page.pdfPrintingFinished.connect(lambda *_: application.quit())
            page.printToPdf(str(arguments.pdf))
        else:
            application.quit()

    def evaluate(expression):
        # Qt hands over texts and numbers, lists it loses.
        page.runJavaScript(f"JSON.stringify({expression})", on_result)

    def on_result(result):
        found["result"] = json.loads(result) if result else None
        QTimer.singleShot(500, finish if arguments.then is None else look_again)  # what the script changed is painted

    def look_again():
        script, arguments.then = arguments.then, None
        evaluate(script)

    def on_load(is_loaded):
        found["is_loaded"] = is_loaded
        QTimer.singleShot(400, lambda: evaluate(arguments.script))

    page.loadFinished.connect(on_load)
    page.load(QUrl.fromLocalFile(str(arguments.page.resolve())))
    QTimer.singleShot(DEADLINE_MS, lambda: application.exit(1))
    status = application.exec()
    # In the order in which they depend on each other, or Qt complains.
    view.deleteLater()
    del view, page
    return status


if __name__ == "__main__":
    sys.exit(main())
