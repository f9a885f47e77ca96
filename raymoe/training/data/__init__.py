"""From files of text or conversations to shards of tokens on disk, and the order in which training reads them."""
