"""SGLang's PD interfaces over `sgl_kvq.transfer`."""
