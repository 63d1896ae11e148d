// Package guest is what a lab guest and its host agree on.
//
// The lab guest is a two-disk Debian machine that the tests protect, kill and
// recover. It is made by package image (in seconds, without root, loop device
// or mount), run by package guestvm, and everything that happens inside is
// the program cmd/landfall-guest (package inside), which is process 1 there:
//
//   - At every boot it finds out whether ext4 has to replay a journal, on
//     which disk, before it mounts anything; verifies every file and the
//     ledger; prints one VERIFY line; prints READY when the power button and
//     the guest agents are listened to; and only then goes on writing. So a
//     recovered copy tells what it is by itself, whoever boots it and with
//     whatever devices.
//   - The writer keeps a two-disk ledger (package ledger): intent n is made
//     durable on the OS disk, then commit n on the data disk, then n is
//     acknowledged to the outside. A copy of both disks at one instant has
//     commit <= intent <= commit+1, and everything acknowledged before.
//   - Some steps also write, rewrite or delete a checksummed file on each
//     disk (package filering). Which file a step touches, its size and its
//     content follow from the ledger's id and the step's number: so a copy
//     with commit n has exactly the files of step n, and a lost or
//     resurrected file is found as surely as a damaged one.
//
// This package holds the lines, names and JSON that cross the boundary.
// README.md lists the Debian packages that the lab needs.
package guest

import (
	"encoding/json"
	"strconv"
	"strings"
)

// Lines that the guest prints on its console, each at the start of a line.
const (
	// ReadyLine is printed when the power button and the agents are listened to, after the VERIFY line of the boot.
	ReadyLine = "LANDFALL-READY"
	// VerifyPrefix comes before the JSON of a Report.
	VerifyPrefix = "LANDFALL-VERIFY "
	// AckPrefix comes before the number of an acknowledged step, when there is no port for it.
	AckPrefix = "LANDFALL-ACK "
	// PowerLine is printed when an orderly power down begins.
	PowerLine = "LANDFALL-POWER-DOWN"
	// FatalPrefix comes before the reason why the guest gives up booting; the kernel panics after it.
	FatalPrefix = "LANDFALL-FATAL "
)

// Names of virtio-serial ports.
const (
	// AgentPort is the guest agent's port for the system under test.
	AgentPort = "org.qemu.guest_agent.0"
	// LabAgentPort is a second agent's port, for the lab itself: a port serves one client.
	LabAgentPort = "org.landfall.agent.0"
	// AckPort carries "ACK n" and VERIFY lines to the lab.
	AckPort = "org.landfall.ack.0"
)

// Labels of the file systems, by which the guest finds its disks on any bus.
const (
	OSLabel   = "landfall-os"
	DataLabel = "landfall-data"
)

// Program is the path of landfall-guest in the guest, for guest-exec.
const Program = "/usr/bin/landfall-guest"

// PerDisk is one value for each of the two disks.
type PerDisk[T any] struct {
	OS   T `json:"os"`
	Data T `json:"data"`
}

// Report is what a verification found.
type Report struct {
	// OK: no problem at all. A replayed journal is not a problem by itself.
	OK bool `json:"ok"`
	// Fresh: there was no ledger on either disk, as on the first boot.
	Fresh bool `json:"fresh"`
	// Boot is the kernel's id of this boot.
	Boot string `json:"boot"`
	// Ledger is the id of the ledger, made at the first boot.
	Ledger string `json:"ledger"`
	// Intent and Commit are the newest steps on the OS and on the data disk.
	Intent uint64 `json:"intent"`
	Commit uint64 `json:"commit"`
	// Files counts the files whose content was checked, on both disks.
	Files int `json:"files"`
	// Bad tells each problem in a few words; at most MaxBad of them.
	Bad []string `json:"bad"`
	// JournalReplayed tells for each disk whether ext4 had a journal to replay when it was mounted at this boot.
	JournalReplayed PerDisk[bool] `json:"journal_replayed"`
	// FSErrors are the error counts in the superblocks.
	FSErrors PerDisk[uint32] `json:"fs_errors"`
	// TookMS is how long the verification took, in milliseconds.
	TookMS int64 `json:"took_ms"`
}

// MaxBad bounds Report.Bad.
const MaxBad = 20

// AddBad adds problems up to MaxBad.
func (r *Report) AddBad(problems ...string) {
	for _, p := range problems {
		if len(r.Bad) < MaxBad {
			r.Bad = append(r.Bad, p)
		}
	}
}

// Line is the report as the guest prints it, without an end of line.
func (r Report) Line() (string, error) {
	if r.Bad == nil {
		r.Bad = []string{}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	return VerifyPrefix + string(b), nil
}

// ParseReport reads a line; false when it is not a whole VERIFY line.
func ParseReport(line string) (Report, bool) {
	i := strings.Index(line, VerifyPrefix)
	if i < 0 {
		return Report{}, false
	}
	var r Report
	if json.Unmarshal([]byte(strings.TrimSpace(line[i+len(VerifyPrefix):])), &r) != nil {
		return Report{}, false
	}
	return r, true
}

// LastReport finds the newest VERIFY line in a console's text.
func LastReport(console string) (Report, bool) {
	lines := strings.Split(console, "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if r, ok := ParseReport(lines[i]); ok {
			return r, true
		}
	}
	return Report{}, false
}

// ParseAck reads "ACK n" (port) or "LANDFALL-ACK n" (console); false when the line is another one.
func ParseAck(line string) (uint64, bool) {
	line = strings.TrimSpace(line)
	rest, ok := strings.CutPrefix(line, strings.TrimPrefix(AckPrefix, "LANDFALL-"))
	if !ok {
		rest, ok = strings.CutPrefix(line, AckPrefix)
	}
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(rest, 10, 64)
	return n, err == nil
}

// Settings is the file SettingsPath on the OS disk, in JSON.
type Settings struct {
	// Rate is how many steps a second the writer does; 0 as many as it can, negative none at all.
	Rate int `json:"rate"`
}

// SettingsPath is where the image builder puts Settings.
const SettingsPath = "/etc/landfall-guest.json"
