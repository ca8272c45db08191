// SPDX-License-Identifier: Apache-2.0
//
// The kernel's side of Faultline: headers, newer ABI back-ported, and one thin
// function per call. No logic lives here. The headers stay within what the C library
// offers by default: _GNU_SOURCE changes the layout of shared types, and other C
// modules of the same program are built without it.
#ifndef FAULTLINE_CLINUX_H
#define FAULTLINE_CLINUX_H

#include "clinux_system.h"
#include "clinux_userfaultfd.h"
#include "clinux_pagemap.h"
#include "clinux_kvm.h"

#endif
