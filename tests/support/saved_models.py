"""Models saved into folders."""

from headwise.interventions import load
from tests.oracles import raw_families, raw_hooks


def saved(name, folder):
    """A random model of a family, with a tokenizer."""
    module = raw_hooks.random_gpt2(2, 2, 8, 50, 20) if name == "gpt2" else raw_families.random_model(name)
    return kept(module, folder)


def kept(module, folder):
    """A model, saved with a tokenizer whose words are numbers."""
    module.save_pretrained(folder)
    load._id_tokenizer(module.config.vocab_size).save_pretrained(folder)
    return module
