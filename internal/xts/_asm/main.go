// Command asm generates the assembly of package xts. Run it with go generate
// in that package.
//
// Every kernel has the same form. A vector register holds lanes blocks of 16
// bytes (1, 2 or 4), and eight registers make a batch of 8*lanes blocks, whose
// tweaks are kept beside it. After a batch each of its tweaks is multiplied by
// x^(8*lanes), which is a shift by whole bytes: lanes bytes up, and the bytes
// that fall out come back multiplied by x^7+x^2+x+1. So the eight tweaks do not
// depend on each other.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Layout of the expanded keys; the package has the same numbers.
const (
	encryptKeys = 0   // data key, for encryption: 15 round keys of 16 bytes
	decryptKeys = 256 // data key, for the equivalent inverse cipher
	tweakKeys   = 512 // tweak key, for encryption
	rounds      = 14
)

const batch = 8 // registers

func main() {
	ConstraintExpr("amd64")

	expandKeys()
	cpuid()
	tables()
	for _, decrypt := range []bool{false, true} {
		vex("AESNI", decrypt, 16)
		vex("AVX2", decrypt, 32)
		avx512(decrypt)
	}
	Generate()
}

func direction(decrypt bool) string {
	if decrypt {
		return "decrypt"
	}
	return "encrypt"
}

func dataKeys(decrypt bool) int {
	if decrypt {
		return decryptKeys
	}
	return encryptKeys
}

// A run is the frame of a kernel: it walks over the units that the run of
// sectors touches.
type run struct {
	keys, dst, src   Register // addresses
	sectors          Register // left after the current unit
	lo, hi           Register // number of the next unit
	skip             Register // sectors of the current unit before the run
	count            Register // batches left in the current unit
	batchesPerSector int
	encryptTweak     func() // makes the first tweak of unit hi:lo and keeps it
	skipSector       func() // advances the kept tweak by a sector
	spread           func() // makes the tweaks of a unit's first batch of the kept one
	processBatch     func() // src to dst, and the next batch's tweaks
	clean            func() // leaves no key in the registers
}

// start declares the function name and loads its arguments.
func start(name, doc string) *run {
	TEXT(name, NOSPLIT, "func(keys, dst, src *byte, sectors, lo, hi, skip uint64)")
	Doc(name+" "+doc, "", "See runKernel for the parameters.")
	Pragma("noescape")
	return &run{
		keys:    Load(Param("keys"), GP64()),
		dst:     Load(Param("dst"), GP64()),
		src:     Load(Param("src"), GP64()),
		sectors: Load(Param("sectors"), GP64()),
		lo:      Load(Param("lo"), GP64()),
		hi:      Load(Param("hi"), GP64()),
		skip:    Load(Param("skip"), GP64()),
		count:   GP64(),
	}
}

// generate emits the loops. The tweak of the next unit is encrypted before the
// batches of the current one, so that its rounds, each waiting for the one
// before, hide behind theirs.
func (r *run) generate() {
	r.encryptTweak()
	TESTQ(r.skip, r.skip)
	JZ(LabelRef("unit"))

	Label("skip")
	r.skipSector()
	DECQ(r.skip)
	JNZ(LabelRef("skip"))
	Load(Param("skip"), r.skip)

	Label("unit")
	Comment("count = min(sectors, 8 - skip); only the first unit skips.")
	MOVQ(U64(8), r.count)
	SUBQ(r.skip, r.count)
	XORQ(r.skip, r.skip)
	CMPQ(r.sectors, r.count)
	CMOVQCS(r.sectors, r.count)
	SUBQ(r.count, r.sectors)
	if r.batchesPerSector > 1 {
		IMUL3Q(U32(r.batchesPerSector), r.count, r.count)
	}
	r.spread()
	TESTQ(r.sectors, r.sectors)
	JZ(LabelRef("batch"))
	ADDQ(Imm(1), r.lo)
	ADCQ(Imm(0), r.hi)
	r.encryptTweak()

	Label("batch")
	r.processBatch()
	ADDQ(U32(512/r.batchesPerSector), r.src)
	ADDQ(U32(512/r.batchesPerSector), r.dst)
	DECQ(r.count)
	JNZ(LabelRef("batch"))
	TESTQ(r.sectors, r.sectors)
	JNZ(LabelRef("unit"))

	r.clean()
	RET()
}

// at is the i-th vector of size bytes at base + offset.
func at(base Register, offset, i, size int) Mem {
	return Mem{Base: base, Disp: offset + i*size}
}

func cpuid() {
	TEXT("cpuid7", NOSPLIT, "func() (ecx uint32)")
	Doc("cpuid7 returns ECX of CPUID leaf 7, subleaf 0: extended feature flags. The CPU",
		"must have that leaf.")
	MOVL(U32(7), EAX)
	XORL(ECX, ECX)
	CPUID()
	Store(ECX, ReturnIndex(0))
	RET()
}
