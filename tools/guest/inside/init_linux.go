package inside

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/landfall-dr/landfall/tools/guest"
)

// Time bounds of booting and of powering down.
const (
	dataDiskTimeout = 10 * time.Second // for the data disk to appear: a copy may come without it
	agentTimeout    = 30 * time.Second // for the agents to open their ports
	agentRestart    = time.Second      // between an agent's end and its next start
	writerStop      = 5 * time.Second  // for the writer to finish its step
	childrenStop    = 2 * time.Second  // for all others
	pollEach        = 10 * time.Millisecond
	agentProgram    = "/usr/sbin/qemu-ga"
)

// Init is /sbin/init of the OS disk. It returns only when booting failed; the machine ends with it.
func Init() error {
	state, err := mountAll()
	if err != nil {
		return err
	}
	report := Verify(state)
	line, err := report.Line()
	if err != nil {
		return err
	}
	say(line)
	p, ok := openPort()
	if ok {
		p.line(line)
		p.close()
	}

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGCHLD)
	power := make(chan struct{}, 1)
	buttons, err := listenPowerButtons(power)
	if err != nil {
		return err
	}
	procs := newProcesses()
	agents := startAgents(procs)
	waitAgents(agents)
	say(fmt.Sprintf("%s buttons=%d agents=%d", guest.ReadyLine, buttons, len(agents)))

	settings := ReadSettings()
	writer := 0
	if report.OK && settings.Rate >= 0 {
		if writer, err = procs.start([]string{guest.Program, "writer"}); err != nil {
			say("landfall-guest: " + err.Error())
		}
	}
	for {
		select {
		case s := <-signals:
			switch s {
			case unix.SIGCHLD:
				for _, pid := range procs.reap() {
					if again, isAgent := agents[pid]; isAgent {
						delete(agents, pid)
						// In the background, so that reaping goes on; bounded by the delay.
						time.AfterFunc(agentRestart, func() { signals <- restart{again} })
					}
				}
			case unix.SIGTERM:
				return powerDown(procs, writer, unix.LINUX_REBOOT_CMD_POWER_OFF)
			case unix.SIGINT:
				return powerDown(procs, writer, unix.LINUX_REBOOT_CMD_RESTART)
			default:
				if r, ok := s.(restart); ok {
					if pid, err := procs.start(r.argv); err == nil {
						agents[pid] = r.argv
					}
				}
			}
		case <-power:
			return powerDown(procs, writer, unix.LINUX_REBOOT_CMD_POWER_OFF)
		}
	}
}

// restart asks the main loop to start a process again; it travels like a signal.
type restart struct{ argv []string }

func (restart) String() string { return "restart" }

// Signal makes restart an os.Signal.
func (restart) Signal() {}

// mountAll mounts everything and keeps what the superblocks said. Only the OS disk is needed to go on.
func mountAll() (bootState, error) {
	var state bootState
	if err := json.Unmarshal([]byte(os.Getenv(osStateEnv)), &state.OS); err != nil {
		return state, fmt.Errorf("state of the OS disk from the first stage: %w", err)
	}
	for _, target := range []string{"/run", "/tmp"} {
		if err := mountOne("tmpfs", target, "tmpfs", 0, "mode=0755,size=16m"); err != nil {
			return state, err
		}
	}
	for _, d := range []string{runFolder, osFolder} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return state, err
		}
	}
	_ = unix.Sethostname([]byte("landfall-guest"))

	ctx, cancel := context.WithTimeout(context.Background(), dataDiskTimeout)
	defer cancel()
	data, err := findFS(ctx, guest.DataLabel)
	if err == nil {
		state.Data = data
		err = mountOne(data.Device, dataMount, "ext4", unix.MS_NOATIME, "errors=remount-ro")
	}
	if err != nil {
		state.Problem = "data disk: " + err.Error()
	}
	b, err := json.Marshal(state)
	if err != nil {
		return state, err
	}
	return state, os.WriteFile(bootStatePath, b, 0o644)
}

// ReadSettings reads the image's settings; the default writes 20 steps a second.
func ReadSettings() guest.Settings {
	s := guest.Settings{Rate: 20}
	b, err := os.ReadFile(guest.SettingsPath)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		say("landfall-guest: settings: " + err.Error())
	}
	return s
}

// startAgents starts one guest agent for each agent port of the machine.
func startAgents(procs *processes) map[int][]string {
	agents := map[int][]string{}
	for i, name := range []string{guest.AgentPort, guest.LabAgentPort} {
		path, ok := portPath(name)
		if !ok {
			continue
		}
		dir := filepath.Join("/run/agent", strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			say("landfall-guest: " + err.Error())
			continue
		}
		// All its files are on a RAM file system: it must not write to one that it has frozen.
		argv := []string{agentProgram, "-m", "virtio-serial", "-p", path, "-t", dir, "-f", dir + "/pid", "-l", dir + "/log"}
		pid, err := procs.start(argv)
		if err != nil {
			say("landfall-guest: " + err.Error())
			continue
		}
		agents[pid] = argv
	}
	return agents
}

// waitAgents waits until each agent has its port open.
func waitAgents(agents map[int][]string) {
	tick := time.NewTicker(pollEach)
	defer tick.Stop()
	deadline := time.After(agentTimeout)
	for pid, argv := range agents {
		for !hasOpen(pid, argv[4]) {
			select {
			case <-tick.C:
			case <-deadline:
				say(fmt.Sprintf("landfall-guest: agent %d does not open %s", pid, argv[4]))
				return
			}
		}
	}
}

// hasOpen tells whether a process has a file open.
func hasOpen(pid int, path string) bool {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return false
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == path {
			return true
		}
	}
	return false
}

// powerDown ends everything in order, so that the next boot has no journal to replay.
func powerDown(procs *processes, writer, how int) error {
	say(guest.PowerLine)
	if writer != 0 {
		_ = unix.Kill(writer, unix.SIGTERM)
		procs.waitGone(writerStop, writer)
	}
	_ = unix.Kill(-1, unix.SIGTERM)
	procs.waitAll(childrenStop)
	_ = unix.Kill(-1, unix.SIGKILL)
	procs.waitAll(childrenStop)
	unix.Sync()
	if err := unix.Unmount(dataMount, 0); err != nil {
		say("landfall-guest: unmount the data disk: " + err.Error())
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		say("landfall-guest: make the OS disk read-only: " + err.Error())
	}
	unix.Sync()
	if err := unix.Reboot(how); err != nil {
		return fmt.Errorf("power down: %w", err)
	}
	select {} // the kernel stops the machine
}

// RequestPowerDown asks process 1 to power down, or to start again.
func RequestPowerDown(again bool) error {
	s := syscall.SIGTERM
	if again {
		s = syscall.SIGINT
	}
	return syscall.Kill(1, s)
}
