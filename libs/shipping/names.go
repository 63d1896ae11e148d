package shipping

import (
	"fmt"
	"strings"
)

// Machine is the parts of a machine's resource name.
type Machine struct{ Site, VM string }

// ParseMachine takes "sites/{site}/vms/{vm}" apart.
func ParseMachine(name string) (Machine, error) {
	p := strings.Split(name, "/")
	if len(p) != 4 || p[0] != "sites" || p[2] != "vms" || p[1] == "" || p[3] == "" {
		return Machine{}, fmt.Errorf("machine %q: want sites/{site}/vms/{vm}", name)
	}
	return Machine{Site: p[1], VM: p[3]}, nil
}

// HostID is the bare id in "sites/{site}/hosts/{host}"; a bare id is returned as it is.
func HostID(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }
