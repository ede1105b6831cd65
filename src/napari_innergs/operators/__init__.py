"""One autograd function and one public function for each differentiable operator."""
