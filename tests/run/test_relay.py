"""A batch handed from module to module."""

import torch

from ondevice_trgl.run.relay import Relay


def test_what_one_module_puts_out_is_what_the_next_one_reads() -> None:
    relay = Relay(4, [(3, 2), (5,)], torch.device("cpu"))
    first, second = torch.randn(4, 3, 2), torch.randn(4, 5)
    labels = torch.tensor([1, 0, 2, 1])
    for _ in range(2):  # the second batch finds the halves the other way round
        relay.begin(labels, (3, 2))
        put = relay.rewound()
        put(torch.full((2, 3, 2), 9.0))  # a try that was cut off
        put = relay.rewound()
        put(first[:2])
        put(first[2:])
        relay.advance((5,))
        out = torch.zeros(2, 3, 2)
        assert relay.read([3, 1], out).tolist() == [1, 0]
        assert relay.shape == (3, 2)
        assert torch.equal(out, first[[3, 1]])
        relay.rewound()(second)
        relay.advance((5,))
        out = torch.zeros(4, 5)
        relay.read([0, 1, 2, 3], out)
        assert torch.equal(out, second)
