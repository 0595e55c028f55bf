"""The closing line."""


def pytest_unconfigure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    count = {name: len(reporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped", "xfailed")}
    line = f"chart: {count['passed']} passed, {count['failed'] + count['error']} failed"
    for name, meaning in (("skipped", "skipped"), ("xfailed", "not yet possible")):
        line += f", {count[name]} {meaning}" if count[name] else ""
    print(line)
