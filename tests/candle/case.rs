//! A case's arguments as candle's variables, and what candle gives for them: of the tests on the CPU and on a GPU.

use candle_core::{DType, Device, Tensor, Var};
use dla::Buffer;
use dla::check::{Case, Recipe};
use dla::interop::candle::Arguments;

/// A variable of the CPU or a GPU.
pub fn var(x: &Buffer, shape: &[usize], device: &Device) -> Var {
    match x {
        Buffer::F32(x) => Var::from_slice(x, shape, device),
        Buffer::Bf16(x) => Var::from_slice(x, shape, device),
        Buffer::F16(x) => Var::from_slice(x, shape, device),
    }
    .unwrap()
}

/// Elements of a tensor, wherever it is.
pub fn f32s(x: &Tensor) -> Vec<f32> {
    let x = x.flatten_all().unwrap().to_device(&Device::Cpu).unwrap();
    x.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// The event log's bytes.
pub fn bytes(x: &Tensor) -> Vec<u8> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// A case's arguments.
pub struct Variables {
    /// In the order of [`Arguments`].
    pub all: [Option<Var>; 9],
    /// The gradient of o.
    pub d_o: Tensor,
}

impl Variables {
    pub fn of(case: &Case, device: &Device) -> Self {
        let Recipe { batch, time, heads, value_heads, dk, dv, extra_columns, .. } = case.recipe;
        let (b, t, h, hv) = (batch, time, heads, value_heads);
        let columns = case.recipe.options.capacity + extra_columns;
        let optional =
            |x: Option<&Vec<f32>>, shape: &[usize]| x.map(|x| Var::from_slice(x, shape, device).unwrap());
        let route = case.route.as_ref();
        Variables {
            all: [
                Some(var(&case.q, &[b, t, h, dk], device)),
                Some(var(&case.k, &[b, t, h, dk], device)),
                Some(var(&case.v, &[b, t, hv, dv], device)),
                optional(case.g.as_ref(), &[b, t, hv]),
                optional(case.beta.as_ref(), &[b, t, hv]),
                optional(case.lambda.as_ref(), &[b, t, hv, columns]),
                optional(route.map(|route| &route.slope), &[hv]),
                optional(route.map(|route| &route.bias), &[hv]),
                optional(route.and_then(|route| route.logits.as_ref()), &[b, t, hv, columns]),
            ],
            d_o: var(&case.d_o, &[b, t, hv, dv], device).as_detached_tensor(),
        }
    }

    pub fn arguments(&self) -> Arguments {
        let [q, k, v, g, beta, lambda, slope, bias, logits] =
            self.all.each_ref().map(|x| x.as_ref().map(|x| x.as_tensor().clone()));
        let [Some(q), Some(k), Some(v)] = [q, k, v] else { unreachable!() };
        Arguments { q, k, v, g, beta, lambda, slope, bias, logits }
    }

    /// The sum of o times its gradient.
    pub fn loss(&self, o: &Tensor) -> Tensor {
        (o * &self.d_o).unwrap().sum_all().unwrap()
    }

    /// Gradients of the variables.
    pub fn gradients(&self, loss: &Tensor) -> [Option<Vec<f32>>; 9] {
        let gradients = loss.backward().unwrap();
        self.all.each_ref().map(|x| x.as_ref().map(|x| f32s(gradients.get(x).unwrap())))
    }
}
