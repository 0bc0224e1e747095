//go:build race

package kmipd

const raceDetector = true
