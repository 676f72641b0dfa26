// What all instances of rules include, compiled once for all of them.
#pragma once
#define DANLU_ISA cuda
#include "cuda/engine.cuh"
#include "cuda/reduce.cuh"
