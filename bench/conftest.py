"""`pytest bench`: parametrizes `test_provider` of each benchmark with every provider of every case."""


def pytest_generate_tests(metafunc):
    ids, values = [], []
    for case in metafunc.module.cases():
        shape = ", ".join(f"{k}={v}" for k, v in case.shape.items())
        for name, provider in case.providers.items():
            ids.append(f"{case.name}, {case.dtype}, {shape}, {name}")
            values.append((case, provider))
    metafunc.parametrize("case, provider", values, ids=ids)
