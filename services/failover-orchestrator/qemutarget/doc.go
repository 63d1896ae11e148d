// Package qemutarget is recovery target "qemu": the folder of target vhd, and a
// machine that runs from it.
//
// Every disk's fixed VHD stays what the recovery point was; the machine writes
// to a qcow2 overlay over it (docs/formats/qemu-target.md). QEMU runs detached,
// so that it survives the orchestrator, and is found again from the folder:
//
//   - It inherits an open file description that holds a lock on qemu.lock, from
//     before it is started until its last instruction. Whoever gets the lock
//     knows that no QEMU of this folder runs, not even one that is just being
//     started by a process that was killed; so there are never two.
//   - Its UUID follows from the failover and the folder. The monitor is asked
//     for it before anything is told to it, and a process is killed by its pid
//     only when its command line has it.
//
// What is decided for every machine: the accelerator is what the settings say
// and never looked for; no default devices; a VGA adapter without a display, so
// that there is a screenshot; the first serial port is the console file; a
// guest agent's channel; one NIC for each of the source's with its MAC address,
// connected to nothing (a cable to a switch without other ports), so that a
// guest with fixed addresses comes up as it is and reaches nobody. With network
// "user" the first NIC reaches out through this machine instead.
package qemutarget
