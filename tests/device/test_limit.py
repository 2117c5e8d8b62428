"""What a refusal of memory says."""

from ondevice_trgl.device.limit import refused_bytes


def test_how_much_was_refused_is_read_from_what_an_error_came_from() -> None:
    refused = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 411041792 bytes. Error 12"
    )
    outer = ValueError("the model cannot be built")
    outer.__cause__ = refused
    assert refused_bytes(refused) == refused_bytes(outer) == 411_041_792
    assert refused_bytes(MemoryError()) == refused_bytes(None) == 0
