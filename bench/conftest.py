"""`pytest bench`: every provider of every case of a benchmark is a parameter of its `test_provider`."""


def pytest_generate_tests(metafunc):
    ids, values = [], []
    for case in metafunc.module.cases():
        shape = ", ".join(f"{k}={v}" for k, v in case.shape.items())
        for name, provider in case.providers.items():
            ids.append(f"{case.name}, {case.dtype}, {shape}, {name}")
            values.append((case, provider))
    metafunc.parametrize("case, provider", values, ids=ids)
