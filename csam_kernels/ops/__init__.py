"""One file an operation: public function, schema, fake and autograd."""
