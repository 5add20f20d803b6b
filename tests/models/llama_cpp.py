"""llama.cpp through the wheel `cyllama`: a file opened, its logits and its tokens."""

import numpy as np

N_CONTEXT = 256


class LlamaCpp:
    """One model, with keys and values in float32 and one thread. Source: the headers of llama.cpp, llama.h."""

    def __init__(self, path):
        import cyllama.llama.llama_cpp as library

        library.disable_logging()
        library.llama_backend_init()
        library.ggml_backend_load_all()

        class Model(library.LlamaModel):
            @property
            def n_vocab(self):  # 0.2.18 asks the model for it, which llama.cpp no longer answers
                return self.get_vocab().n_vocab

        self.library, self.model = library, Model(str(path), library.LlamaModelParams(), False)
        self.settings = library.LlamaContextParams()
        self.settings.n_ctx = self.settings.n_batch = self.settings.n_ubatch = N_CONTEXT
        self.settings.n_threads = self.settings.n_threads_batch = 1
        self.settings.type_k = self.settings.type_v = 0
        self.settings.flash_attn_type = 0

    def logits(self, ids):
        """[T, V] float32, of one row of at most N_CONTEXT tokens."""
        context = self.library.LlamaContext(self.model, self.settings, False)
        batch = self.library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, i in enumerate(ids):
            batch.add(int(i), place, [0], True)
        context.decode(batch)
        found = np.stack([np.array(context.get_logits_ith(i), np.float32) for i in range(len(ids))])
        context.close()
        return found

    def greedy(self, ids, n):
        """The n likeliest tokens, one after another."""
        ids = list(ids)
        for _ in range(n):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-n:]

    def encode(self, text):
        return list(self.model.get_vocab().tokenize(text, False, False))
