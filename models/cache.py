"""Keys and values of the tokens that are final, so that a pass reads only those that are not.

A pass writes the keys and values of its tokens behind the kept ones, where the next pass overwrites them; keep() makes
the first of them permanent. So passes that only denoise store nothing, and nothing is copied.

R rows of one length, G key/value heads, L tokens, hd head width.
"""


class Cache:
    """For transformers' models it is past_key_values: update() and the three methods after it are what they call."""

    def __init__(self, capacity):
        """capacity: tokens of the longest row that a pass will see, kept ones included."""
        self.capacity, self.length = capacity, 0
        self.layers = {}  # {layer: (keys, values)}, (R, G, capacity, hd) each

    def update(self, keys, values, layer):
        """keys, values (R, G, n, hd) of the tokens after the kept ones -> those of all, (R, G, length + n, hd)."""
        if layer not in self.layers:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.layers[layer] = (keys.new_empty(shape), values.new_empty(shape))
        stop = self.length + keys.shape[2]
        for store, new in zip(self.layers[layer], (keys, values)):
            store[:, :, self.length : stop] = new
        return tuple(store[:, :, :stop] for store in self.layers[layer])

    def get_seq_length(self, layer=0):
        return self.length

    def get_query_offset(self, layer=0):
        return self.length

    def get_mask_sizes(self, query_length, layer=0):
        """(keys that a pass of query_length tokens sees, the place of the first)."""
        return self.length + query_length, 0

    def keep(self, length):
        """Keep the first `length` tokens; the last pass wrote those that were not kept before."""
        self.length = length

    def select(self, rows):
        """Drop all rows but those that `rows` (R,) bool says."""
        if not rows.all():
            self.layers = {layer: tuple(store[rows] for store in pair) for layer, pair in self.layers.items()}
