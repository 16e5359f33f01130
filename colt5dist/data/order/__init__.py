"""Which text sample number i is made from: blocks of documents, the plan of an epoch, mixtures, skipped ranges."""
