//go:build !race

package vdisk

const raceEnabled = false
